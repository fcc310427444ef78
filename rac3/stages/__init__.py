"""What runs when: each stage reads artifacts and writes one."""
