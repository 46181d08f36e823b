"""The result of an analysis: its numbers, as a table, as figures and as files."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from seg4diff.analysis import plots
from seg4diff.files import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.table import Table

_FORMAT = "seg4diff analysis 3"
_FORMATS = ("seg4diff analysis 2", _FORMAT)  # 2 has no sinks


@dataclass(frozen=True, eq=False)
class Measures:
    """Means over images and tokens, float64 [levels, layers] or, of single heads, [levels, layers, heads].

    Attributes:
        image_to_text: share of their attention that image tokens give to text tokens (all of them, padding
            included). What they give to image tokens, I2I, is one minus this.
        text_to_text: share that text tokens give to text tokens; T2I is one minus this.
        image_value_norm: Euclidean norm of the image tokens' values: of all heads together, or of one.
        text_value_norm: the same of all text tokens.
        prompt_value_norm: the same of the tokens that stand for the prompt's characters, without begin, end
            and padding; NaN if all prompts are empty.
    """

    image_to_text: Tensor
    text_to_text: Tensor
    image_value_norm: Tensor
    text_value_norm: Tensor
    prompt_value_norm: Tensor

    @property
    def image_to_image(self) -> Tensor:
        """One minus `image_to_text`."""
        return 1 - self.image_to_text

    @property
    def text_to_image(self) -> Tensor:
        """One minus `text_to_text`."""
        return 1 - self.text_to_text

    @property
    def value_norm_ratio(self) -> Tensor:
        """Norm of the prompt's values (of all text where prompts are empty) over that of the image's."""
        text = torch.where(self.prompt_value_norm.isnan(), self.text_value_norm, self.prompt_value_norm)
        return text / self.image_value_norm


@dataclass(frozen=True, eq=False)
class AnalysisReport:
    """What `seg4diff.analyze` returns.

    Attributes:
        layers: the layers analysed, in the order of all tensors' second axis.
        noise_levels: steps that are left of the noise schedule at each level, the order of the first axis.
        timesteps: the model's timestep at each level.
        by_layer: measures of whole layers, [levels, layers].
        by_head: of single heads, [levels, layers, heads], or None.
        uniform_to_text: share that text would get if attention were uniform, T / (N + T).
        images: number of images averaged.
        projections: for `"query"`, `"key"`, `"value"` the first three principal components of the first
            image's tokens, float32 [levels, layers, N, 3]; empty if not asked for.
        grid: height and width of its image tokens, N = height * width.
        sinks: share of their attention that image tokens give to each text token, float64 [levels, layers],
            by text encoder and token, largest first: `"clip <bos>"`, `"clip <pad>"` (all padding together),
            `"clip cat"`. The largest tokens of prompts by themselves, others as `"other words"`; together
            they are `by_layer.image_to_text`. Empty in reports of earlier versions.
        metadata: how the report was made.
        generated: the images that the pipeline made from the prompts, where the call asks for them with
            `output_type="pil"`; else, and in a report read from files, empty.
    """

    layers: tuple[int, ...]
    noise_levels: tuple[int, ...]
    timesteps: tuple[float, ...]
    by_layer: Measures
    by_head: Measures | None
    uniform_to_text: float
    images: int
    projections: Mapping[str, Tensor]
    grid: tuple[int, int]
    sinks: Mapping[str, Tensor] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    generated: tuple[Image.Image, ...] = ()

    def projection(self, name: str, layer: int, noise_level: int | None = None) -> Tensor:
        """Principal components of one layer as an image.

        Args:
            name: `"query"`, `"key"` or `"value"`.
            layer: number of the layer.
            noise_level: one of `noise_levels`; the first when None.

        Returns:
            [height, width, 3], float32, each component stretched to [0, 1] between its 1st and 99th
            percentile.

        Raises:
            ValueError: not in the report; the message lists what is.
        """
        if name not in self.projections:
            accepted = ", ".join(map(repr, self.projections)) or "none; analyse with projections=True"
            raise ValueError(f"projection {name!r} is not in the report; it holds: {accepted}")
        level = self._level(noise_level)
        if layer not in self.layers:
            raise ValueError(f"layer {layer} is not in the report; it holds layers {list(self.layers)}")
        scores = self.projections[name][level, self.layers.index(layer)]
        low, high = torch.quantile(scores, torch.tensor([0.01, 0.99]), dim=0)
        colours = ((scores - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)
        return rearrange(colours, "(h w) rgb -> h w rgb", h=self.grid[0])

    def table(self, noise_level: int | None = None) -> Table:
        """The measures of every layer at a noise level (the first when None), to print with rich."""
        from rich.box import SIMPLE_HEAD
        from rich.table import Table

        level = self._level(noise_level)
        table = Table(
            title=f"{self.noise_levels[level]} steps left (timestep {self.timesteps[level]:.1f}), "
            f"{self.images} image{'s' if self.images != 1 else ''}",
            caption=f"attention in %; uniform attention gives text {self.uniform_to_text:.2%}",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        columns = (
            "layer",
            "I2I",
            "I2T",
            "I2T/\nunif.",
            "T2I",
            "T2T",
            "image\n|V|",
            "text\n|V|",
            "prompt\n|V|",
        )
        for name in (*columns, "ratio"):
            table.add_column(name, justify="right", no_wrap=True)
        measures = self.by_layer
        for position, layer in enumerate(self.layers):
            at = (level, position)
            to_text = float(measures.image_to_text[at])
            of_prompt = measures.prompt_value_norm[at]  # NaN for empty prompts
            table.add_row(
                str(layer),
                f"{100 * float(measures.image_to_image[at]):.2f}",
                f"{100 * to_text:.2f}",
                f"{to_text / self.uniform_to_text:.2f}",
                f"{100 * float(measures.text_to_image[at]):.2f}",
                f"{100 * float(measures.text_to_text[at]):.2f}",
                f"{float(measures.image_value_norm[at]):.3g}",
                f"{float(measures.text_value_norm[at]):.3g}",
                f"{float(of_prompt):.3g}" if not of_prompt.isnan() else "-",
                f"{float(measures.value_norm_ratio[at]):.3g}",
            )
        return table

    def sink_table(self, noise_level: int | None = None) -> Table:
        """Which text tokens take the attention of image tokens at a noise level (the first when None)."""
        from rich.box import SIMPLE_HEAD
        from rich.markup import escape
        from rich.table import Table

        level = self._level(noise_level)
        table = Table(
            title=f"attention of image tokens to text tokens, {self.noise_levels[level]} steps left",
            caption="in % of all their attention; most: the layer that gives the token most",
            box=SIMPLE_HEAD,
            pad_edge=False,
        )
        table.add_column("token")
        for name in ("mean of layers", "most", "in layer"):
            table.add_column(name, justify="right", no_wrap=True)
        for token, shares in self.sinks.items():
            most = int(shares[level].argmax())
            table.add_row(
                escape(token),
                f"{100 * float(shares[level].mean()):.2f}",
                f"{100 * float(shares[level, most]):.2f}",
                str(self.layers[most]),
            )
        return table

    def plot_attention_mass(self, noise_level: int | None = None) -> Figure:
        """Where the attention of image and of text tokens goes, layer by layer, beside uniform attention."""
        level = self._level(noise_level)
        panels = {
            "image tokens attend to": self.by_layer.image_to_text[level],
            "text tokens attend to": self.by_layer.text_to_text[level],
        }
        return plots.shares(self.layers, panels, self.uniform_to_text)

    def plot_value_norms(self, noise_level: int | None = None) -> Figure:
        """Mean norm of the values of image tokens, of all text tokens and of the prompt's, layer by layer."""
        level = self._level(noise_level)
        norms = {
            "image tokens": self.by_layer.image_value_norm[level],
            "text tokens": self.by_layer.text_value_norm[level],
            "prompt, no padding": self.by_layer.prompt_value_norm[level],
        }
        colours = (plots.IMAGE, plots.TEXT, plots.PROMPT)
        return plots.lines(self.layers, norms, "mean norm of values", colours)

    def plot_projections(self, noise_level: int | None = None, columns: int = 8) -> Figure:
        """The principal components of every layer's queries, keys and values as images.

        Raises:
            ValueError: the report holds no projections.
        """
        if not self.projections:
            raise ValueError("the report holds no projections; analyse with projections=True")
        images = [
            {f"layer {layer} {name}": self.projection(name, layer, noise_level) for name in self.projections}
            for layer in self.layers
        ]
        return plots.panels(images, columns)

    def save(self, path: str | os.PathLike[str]) -> tuple[Path, Path]:
        """Write PATH.safetensors with all tensors and PATH.json with the measures of whole layers
        and the rest; a suffix of ``path`` is dropped.

        Returns:
            Both paths. Each file appears whole or not at all.
        """
        tensors_path, description_path = _paths(path)
        tensors = {f"by_layer.{name}": tensor for name, tensor in _tensors(self.by_layer).items()}
        if self.by_head is not None:
            tensors |= {f"by_head.{name}": tensor for name, tensor in _tensors(self.by_head).items()}
        tensors |= {f"projections.{name}": tensor for name, tensor in self.projections.items()}
        tensors |= {f"sinks.{name}": tensor for name, tensor in self.sinks.items()}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(tensors_path, lambda temporary: save_file(contiguous, temporary))
        description = {
            "format": _FORMAT,
            "layers": self.layers,
            "noise_levels": self.noise_levels,
            "timesteps": self.timesteps,
            "uniform_to_text": self.uniform_to_text,
            "images": self.images,
            "grid": self.grid,
            "by_layer": {name: _numbers(tensor) for name, tensor in _tensors(self.by_layer).items()},
            "sinks": {name: _numbers(tensor) for name, tensor in self.sinks.items()},
            "metadata": dict(self.metadata),
        }
        text = json.dumps(description, indent=2, default=str)
        write_atomically(description_path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return tensors_path, description_path

    @staticmethod
    def load(path: str | os.PathLike[str]) -> AnalysisReport:
        """Read what `save` wrote; `path` with either suffix or none.

        Raises:
            FileNotFoundError: one of the two files is missing.
            ValueError: a file is damaged, or they are not a report.
        """
        tensors_path, description_path = _paths(path)
        for needed in (tensors_path, description_path):
            if not needed.is_file():
                raise FileNotFoundError(f"{str(needed)!r} does not exist; a report is a pair of files")
        try:
            description = json.loads(description_path.read_text(encoding="utf-8"))
            if description.get("format") not in _FORMATS:
                raise ValueError(f"format is {description.get('format')!r}, expected {_FORMAT!r}")
            tensors = load_file(tensors_path)

            def measures(prefix: str) -> Measures:
                return Measures(**{f.name: tensors[f"{prefix}.{f.name}"] for f in fields(Measures)})

            return AnalysisReport(
                layers=tuple(description["layers"]),
                noise_levels=tuple(description["noise_levels"]),
                timesteps=tuple(description["timesteps"]),
                by_layer=measures("by_layer"),
                by_head=measures("by_head") if "by_head.image_to_text" in tensors else None,
                uniform_to_text=description["uniform_to_text"],
                images=description["images"],
                projections={
                    name.removeprefix("projections."): tensor
                    for name, tensor in tensors.items()
                    if name.startswith("projections.")
                },
                grid=tuple(description["grid"]),
                sinks={name: tensors[f"sinks.{name}"] for name in description.get("sinks", ())},
                metadata=description["metadata"],
            )
        except (ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
            raise ValueError(
                f"{str(tensors_path)!r} and {description_path.name!r} are not a saved report, or damaged "
                f"({error})"
            ) from error

    def _level(self, noise_level: int | None) -> int:
        if noise_level is None:
            return 0
        if noise_level not in self.noise_levels:
            raise ValueError(
                f"noise level {noise_level} is not in the report; it holds {list(self.noise_levels)}"
            )
        return self.noise_levels.index(noise_level)


def _tensors(measures: Measures) -> dict[str, Tensor]:
    return {f.name: getattr(measures, f.name) for f in fields(Measures)}


def _numbers(tensor: Tensor) -> list[list[float | None]]:
    """Levels of layers as JSON has them, which knows no NaN."""
    return [[None if math.isnan(value) else value for value in level] for level in tensor.tolist()]


def _paths(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    given = Path(path)
    if given.suffix in (".safetensors", ".json"):
        given = given.with_suffix("")
    return given.with_name(given.name + ".safetensors"), given.with_name(given.name + ".json")


def print_tables(tables: Sequence[Table]) -> None:
    """Print rich tables to standard output."""
    from rich.console import Console

    console = Console()
    for table in tables:
        console.print(table)
