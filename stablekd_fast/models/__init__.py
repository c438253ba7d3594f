"""Models by name, and weights into them."""

from stablekd_fast.models.published import published
from stablekd_fast.models.registry import build, names
from stablekd_fast.models.weights import classes_in, load_weights

__all__ = ["build", "classes_in", "load_weights", "names", "published"]
