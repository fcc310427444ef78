"""A web page that draws, captions, infills and edits with a trained model."""
