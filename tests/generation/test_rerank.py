import numpy as np

from rac3.generation.rerank import best_by_clip, best_by_perplexity


def test_clip_keeps_the_image_nearest_to_its_own_caption() -> None:
    captions = np.array([[1.0, 0.0], [0.0, 1.0]], np.float32)
    images = np.array([[[0.6, 0.8], [0.8, 0.6]], [[0.6, 0.8], [0.8, 0.6]]], np.float32)
    best, scores = best_by_clip(captions, images)
    assert best.tolist() == [1, 0]
    np.testing.assert_allclose(scores, [0.8, 0.8])


def test_perplexity_keeps_the_most_probable() -> None:
    assert best_by_perplexity(np.array([[-2.0, -1.0], [-0.5, -3.0]], np.float32)).tolist() == [1, 0]
