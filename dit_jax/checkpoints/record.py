"""What is known of weights beside their values; whatever we write holds it as JSON where the format has room."""

import dataclasses
from typing import Any

from dit_jax import __version__
from dit_jax.config import DiTConfig, base_config
from dit_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Record:
    """The architecture, how it was trained and is sampled, and where the weights come from."""

    model: DiTConfig
    diffusion: dict[str, Any]
    """The process it was trained with: the fields of `config.diffusion`."""
    sample: dict[str, Any]
    """How to draw from it unless told otherwise: the fields of `config.sample`."""
    class_names: list[str]
    context: str = ""
    """What it is told beside the label: `config.context`."""
    weights: str | None = None
    """"ema" for averaged weights, "model" for raw ones, None where a file does not say."""
    autoencoder: dict[str, Any] | None = None
    """What stands between images and the network (`Codec.about`), if known."""
    step: int | None = None
    """The training step they were taken at, if known."""
    source: str | None = None
    """Name of the file or folder that they were converted from."""
    sha256: str | None = None
    """Of that file, or of the files of that folder (`files.digest`)."""
    dit_jax: str = __version__
    """The version that wrote this."""

    @classmethod
    def of(cls, model: DiTConfig) -> "Record":
        """A record that says of everything but the architecture what is true of the released models."""
        released = base_config()
        if not model.learn_sigma:
            released.diffusion.variance = "fixed_large"
        class_names = [str(label) for label in range(model.num_classes)]
        return cls(model, released.diffusion.to_dict(), released.sample.to_dict(), class_names)

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Record":
        """The record that `to_json` made. Raises InputError if it is not one."""
        try:
            record = cls(**(fields | {"model": DiTConfig(**fields["model"])}))
            # A config takes no field that it does not have, and no value of another type.
            base_config().lock().update({"diffusion": record.diffusion, "sample": record.sample})
            if not all(isinstance(name, str) for name in record.class_names):
                raise TypeError("class_names are not all names")
            if record.autoencoder and not {"name", "sha256"} <= record.autoencoder.keys():
                raise KeyError("autoencoder")
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"its record cannot be read by dit_jax {__version__}: {error}") from error
        return record

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
