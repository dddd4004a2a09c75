"""`ModelSpec`: a model by its name and how to load it, for processes that load their own."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from proxyq.data import image_shape
from proxyq.errors import UsageError
from proxyq.model.load import load_model
from proxyq.model.model import Model


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """What `load_model` takes, and what of the preprocessing is different.

    - `name`: `None` or `digits`, `torchvision:…`, `timm:…`, `hf:…`, `file.py:factory`.
    - `embeddings`: whether tables that are looked up are layers too.
    - `preprocessing`: fields of `Preprocessing` by name.
    """

    name: str | None = None
    weights: str | None = None
    input_shape: tuple[int, ...] | None = None
    embeddings: bool = False
    preprocessing: Mapping[str, Any] = field(default_factory=dict)

    def load(self) -> Model:
        """The model; raises what `load_model` raises, and `UsageError` for wrong channels."""
        model = load_model(
            self.name,
            weights=self.weights,
            input_shape=self.input_shape,
            embeddings=self.embeddings,
        )
        if not self.preprocessing:
            return model
        channels = image_shape(model)[2]
        for name in ("mean", "std"):
            count = len(self.preprocessing.get(name, (0,)))
            if count not in (1, channels):
                raise UsageError(
                    f"--{name} has {count} values, but the network takes images of {channels} "
                    f"channel{'s' if channels > 1 else ''}: give one value, or one for each "
                    "channel."
                )
        changed = {k: tuple(v) if isinstance(v, list) else v for k, v in self.preprocessing.items()}
        return model.replace(preprocessing=replace(model.preprocessing, **changed))

    def to_json(self) -> dict[str, Any]:
        """As plain JSON."""
        return asdict(self)

    @classmethod
    def from_json(cls, record: Mapping[str, Any]) -> "ModelSpec":
        """The same again."""
        shape = record["input_shape"]
        return cls(**{**record, "input_shape": None if shape is None else tuple(shape)})


def check_text(model: Any, data: Any, eval_data: Any) -> None:
    """Refuse what an executor of other processes cannot be sent."""
    given = {"model": model, "data": data, "eval_data": eval_data}
    for name, value in given.items():
        if (
            value is None
            or isinstance(value, str)
            or (name == "model" and isinstance(value, ModelSpec))
        ):
            continue
        raise UsageError(
            f"`{name}` must be text for an executor of other processes, which load it themselves "
            f"(a specification, or for the model a ModelSpec), got {type(value).__name__}: or use "
            "executor='serial'."
        )
