import pytest
import torch

from ds_lightning.errors import ConfigError
from ds_lightning.modules.optimizers import make_optimizers


def make(lr: float, gamma: float = 0.5) -> object:
    return make_optimizers(
        torch.nn.Linear(2, 1).parameters(),
        lambda parameters: torch.optim.SGD(parameters, lr=lr),
        lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=gamma),  # type: ignore[arg-type, return-value]
        lambda: 10,
    )


def test_what_the_optimizer_refuses_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^model\.optimizer: Invalid learning rate: -1\.0$"):
        make(-1.0)
    with pytest.raises(ConfigError, match=r"^model\.lr_scheduler: Factor should be < 1\.0"):
        make(0.1, 2.0)


def test_cosine_asks_for_the_steps_and_ends_at_zero() -> None:
    made = make_optimizers(
        torch.nn.Linear(2, 1).parameters(), lambda parameters: torch.optim.SGD(parameters, lr=0.1), "cosine", lambda: 4
    )
    assert isinstance(made, dict)
    scheduler = made["lr_scheduler"]["scheduler"]  # type: ignore[index]
    for _ in range(4):
        made["optimizer"].step()
        scheduler.step()
    assert scheduler.get_last_lr() == pytest.approx([0.0], abs=1e-9)
