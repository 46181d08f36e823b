"""Writes the tables of models in README.md and docs/models.md, from the backbones and diffusers.

python docs/models.py
"""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import diffusers

from seg4diff.backbones import Backbone, families
from seg4diff.backbones.refused import REFUSED

ROOT = Path(__file__).parents[1]
TABLE = re.compile(
    r"(?<=<!-- models: docs/models\.py writes this table -->\n).*?(?=\n<!-- /models -->)", re.DOTALL
)
MEASURED_HERE: frozenset[str] = frozenset()
"""Names of families whose expert layers a command of this repository found."""

VERBS = ("capture", "words", "segment", "edit", "perturb, guide", "analyze", "train (MAGNET)")


def table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (titles, ["---"] * len(titles), *rows))


def works(family: Backbone) -> tuple[bool, ...]:
    """For each of `VERBS`, whether the backbone has what it needs."""

    def has(*methods: str) -> bool:
        return all(getattr(type(family), name) is not getattr(Backbone, name) for name in methods)

    joint = not family.cross_attention
    words = has("text_spans", "read_encoded")
    segment = words and has("encode_text", "arguments")
    return True, words, segment, words and has("text_arguments"), words, segment and joint, segment and joint


def experts(family: Backbone) -> str:
    """The known expert layers by the number of blocks."""
    known = [f"{_range(layers)} of {count}" for count, layers in sorted(family.experts.items())]
    return ", ".join(known) or "none known"


def _range(layers: tuple[int, ...]) -> str:
    together = len(layers) > 2 and layers == tuple(range(layers[0], layers[-1] + 1))
    return f"{layers[0]} to {layers[-1]}" if together else ", ".join(map(str, layers))


def text_encoders(family: Backbone) -> str:
    """The text encoders that the family's pipeline takes, by the names of their classes."""
    parameters = inspect.signature(getattr(diffusers, family.pipeline).__init__).parameters.values()
    found = []
    for parameter in parameters:
        if re.fullmatch(r"text_encoder(_\d)?", parameter.name):
            kind = getattr(parameter.annotation, "__name__", str(parameter.annotation)).rpartition(".")[2]
            kind = re.sub(r"^PreTrainedModel$", "", kind)
            short = re.match(r"[A-Z][a-z]+\d*|[A-Z]+\d*(?=[A-Z][a-z]|$)", kind)
            optional = " (optional)" if parameter.name in family.optional else ""
            found.append((short.group() if short else kind or "a language model") + optional)
    return ", ".join(found)


@cache
def pipelines_by_transformer() -> dict[str, list[str]]:
    """Names of the exported pipelines that take each transformer class, read from their source.

    Those of perturbed-attention guidance are left out: their processors cannot be intercepted.
    """
    found: dict[str, list[str]] = {}
    folder = Path(diffusers.__file__).parent / "pipelines"
    for file in sorted(folder.glob("*/pipeline_*.py")):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if not isinstance(node, ast.ClassDef) or not hasattr(diffusers, node.name) or "PAG" in node.name:
                continue
            for method in node.body:
                if isinstance(method, ast.FunctionDef) and method.name == "__init__":
                    for argument in method.args.args:
                        if argument.arg == "transformer" and argument.annotation is not None:
                            for name in re.findall(r"\w+", ast.unparse(argument.annotation)):
                                found.setdefault(name, []).append(node.name)
    return found


def readme_table() -> str:
    """README's table."""
    titles = (
        "family",
        "transformer",
        "text encoders",
        "attention",
        "expert layers",
        "measured here",
        "source",
    )
    return table(
        titles,
        [
            (
                family.name,
                f"`{family.transformer}`",
                text_encoders(family),
                "cross" if family.cross_attention else "joint",
                experts(family),
                "yes" if family.name in MEASURED_HERE else "no",
                family.experts_source or "-",
            )
            for family in families()
        ],
    )


def page() -> str:
    """docs/models.md."""
    capabilities = [(family.name, *("yes" if one else "-" for one in works(family))) for family in families()]
    pipelines = [
        (
            family.name,
            f"`{family.transformer}`",
            ", ".join(f"`{name}`" for name in sorted(pipelines_by_transformer().get(family.transformer, ()))),
        )
        for family in families()
    ]
    refused = [
        (f"`{name}`", reason)
        for name, reason in sorted(REFUSED.items())
        if hasattr(diffusers.models.transformers, name)
    ]
    return PAGE.format(
        version=diffusers.__version__,
        models=readme_table(),
        capabilities=table(("family", *VERBS), capabilities),
        pipelines=table(("family", "transformer", "pipelines of diffusers"), pipelines),
        refused=table(("transformer", "why"), refused),
    )


PAGE = """# Models

Written by `python docs/models.py` with diffusers {version}; change the backbones, not this page.

{models}

Layers are numbered from 0 through all block lists. Where no expert layer is known, `seg4diff.segment`
chooses layers for each image, and `seg4diff.rank_layers` measures them. No family has been run with its
published weights here; tests run random models of the real classes.

## What works

{capabilities}

"Words" are heat maps and columns of words. A family with cross-attention has a softmax over the text alone:
an entry of a map is the share of one text token among all text tokens (`kind="logit"` aside). There,
attention mass, maps of text rows or image columns, `analyze` and training do not exist and are refused.

## Pipelines

{pipelines}

A pipeline of another class with one of these transformers can be captured as well.

## Weights, offloading and caches

| | works | tested |
| --- | --- | --- |
| NF4 weights (bitsandbytes), int8 weights (torchao) | yes | tiny models on a CPU |
| `enable_layerwise_casting`, bfloat16 and float8 storage | yes | tiny models on a CPU |
| group offload by blocks and leaves, sequential offload | yes | tiny models on a CPU |
| group offload with streams | not run: needs CUDA | - |
| `set_attention_backend` | layers that are asked compute their own attention | tiny models on a CPU |
| `enable_cache` (first block, Mag, pyramid, TaylorSeer) | with gaps, see below | tiny models on a CPU |
| context and tensor parallelism (`enable_parallelism`) | refused | marked models |

A cache skips layers in some steps, and these are missing from the record: `Capture.gaps` counts them, and a
warning says so. `segment` runs without the cache, and `analyze` refuses.

## What is refused

`seg4diff.patch` raises `NotImplementedError` with the reason.

{refused}
"""


def main() -> None:
    readme = ROOT / "README.md"
    readme.write_text(TABLE.sub(lambda _: readme_table(), readme.read_text("utf-8")), encoding="utf-8")
    (ROOT / "docs" / "models.md").write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
