"""MLflow: where runs live, and the logger."""

from typing import TYPE_CHECKING

from ds_lightning._lazy import lazy_names

if TYPE_CHECKING:
    from .replaying import ReplayedRun as ReplayedRun
    from .replaying import replay as replay
    from .store import Store as Store
    from .store import default_store as default_store
    from .tracker import MLflowTracker as MLflowTracker

__all__ = ["MLflowTracker", "ReplayedRun", "Store", "default_store", "replay"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MLflowTracker": ".tracker",
        "ReplayedRun": ".replaying",
        "Store": ".store",
        "default_store": ".store",
        "replay": ".replaying",
    },
)
