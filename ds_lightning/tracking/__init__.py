"""MLflow: where runs live, and the logger."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .store import Store as Store
    from .store import default_store as default_store
    from .tracker import MLflowTracker as MLflowTracker

__all__ = ["MLflowTracker", "Store", "default_store"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MLflowTracker": ".tracker",
        "Store": ".store",
        "default_store": ".store",
    },
)
