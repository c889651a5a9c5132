"""Several processes for one service: a parent that has the listeners, and workers that accept from them."""
