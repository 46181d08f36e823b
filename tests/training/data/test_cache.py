"""The cache of encodings: what it holds, and that a stale or damaged one is never used."""

from __future__ import annotations

import errno
import logging
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from seg4diff.backbones import find_backbone
from seg4diff.data.examples import Example, read_example
from seg4diff.data.items import Item, Mask, UnusableItemError
from seg4diff.data.registry import Dataset
from seg4diff.data.settings import DataSettings
from seg4diff.files import DamagedFileError
from seg4diff.jobs import lock
from seg4diff.training.data import cache
from seg4diff.training.data.cache import CUT_OFF, encode
from seg4diff.training.data.samples import HeldOutSamples, TrainingSamples, collate, positions, split
from seg4diff.training.settings import TrainSettings
from tests.support import runs, tiny


class Examples:
    """A data set in memory, which counts the items that are read."""

    def __init__(self, examples: list[Example | str], mark: str = "") -> None:
        self.examples = examples
        self.loaded: list[int] = []
        items = [self._item(number, given) for number, given in enumerate(examples)]
        self.dataset = Dataset("made up", "", (), (), None, items, f"made up {mark}")

    def _item(self, number: int, given: Example | str) -> Item:
        def masks(height: int, width: int) -> list[Mask]:
            self.loaded.append(number)
            if isinstance(given, str):
                raise UnusableItemError(given, "made up")
            return [Mask(*pair) for pair in zip(given.classes, given.masks, strict=True)]

        image = Image.new("RGB", (8, 8)) if isinstance(given, str) else given.image
        captions = () if isinstance(given, str) else given.captions
        return Item(f"image-{number}", lambda: image, read_masks=masks, read_captions=lambda: captions)


def example(
    number: int = 0, caption: str = "a red cat on a sofa", size: tuple[int, int] = (64, 64)
) -> Example:
    generator = np.random.default_rng(number)
    pixels = generator.integers(0, 255, (size[1], size[0], 3), np.uint8)
    cat = np.zeros((size[1], size[0]), bool)
    cat[: size[1] // 2] = True
    return Example(f"image-{number}", Image.fromarray(pixels), (cat, ~cat), ("cat", "sofa"), (caption,))


@pytest.fixture(scope="module")
def pipe() -> Any:
    return tiny.pipeline()


DATA = DataSettings(resolution=64, shard=2)


def test_what_is_stored_is_what_the_encoders_say(pipe: Any, tmp_path: Path) -> None:
    source = Examples([example(0), example(1, "cat")])
    found = encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    backbone = find_backbone(pipe)
    pixels = (
        torch.from_numpy(np.array(read_example(source.dataset.items[1]).image)).permute(2, 0, 1)[None].float()
        / 127.5
        - 1
    )
    with torch.no_grad():
        torch.testing.assert_close(found.latents(1), backbone.latents(pipe, pixels)[0], rtol=0, atol=0)
        for number, text in enumerate(["a red cat on a sofa", "cat"]):
            expected = backbone.encode_text(pipe, [text])
            for name, tensor in found.text(number, 0).arguments.items():
                assert torch.equal(tensor, expected[name][0])
        empty = backbone.encode_text(pipe, [""])
        assert all(torch.equal(t, empty[n][0]) for n, t in found.empty_text().arguments.items())
    first = found.text(0, 0)
    assert first.classes.keys() == {"cat", "sofa"}
    assert len(first.classes["cat"]) == 1
    assert found.text(1, 0).classes.keys() == {"cat"}
    assert found.thumbnail(0).shape == (64, 64, 3)
    assert found.descriptions[0].masks[0]["size"] == [64, 64]


def test_built_once(pipe: Any, tmp_path: Path) -> None:
    source = Examples([example(number) for number in range(5)])
    encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    assert source.loaded == [0, 1, 2, 3, 4]
    source.loaded.clear()
    found = encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    assert source.loaded == []
    assert [d.name for d in found.descriptions] == [f"image-{number}" for number in range(5)]


@pytest.mark.parametrize("damage", ["cut off", "longer", "missing", "empty", "header", "description"])
def test_a_damaged_shard_is_built_again_and_alone(
    damage: str, pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Examples([example(number) for number in range(4)])
    before = encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    expected = before.latents(3)
    shard = tmp_path / "shard-00001.safetensors"
    content = shard.read_bytes()
    if damage == "missing":
        shard.unlink()
    else:
        altered = {
            "cut off": content[:-40],
            "longer": content + b"x",
            "empty": b"",
            "header": content.replace(b'"dtype"', b'"dtypf"', 1),
            "description": content.replace(b'"name": "image-3"', b'"name": "image-2"'),
        }
        assert altered[damage] != content
        shard.write_bytes(altered[damage])
    source.loaded.clear()
    with caplog.at_level(logging.WARNING, logger="seg4diff"):
        found = encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    assert source.loaded == [2, 3]
    assert ("built again" in caplog.text) == (damage != "missing")
    assert torch.equal(found.latents(3), expected)


def test_an_altered_shard_is_noticed_when_it_is_first_used(pipe: Any, tmp_path: Path) -> None:
    source = Examples([example(number) for number in range(4)])
    latents = encode(pipe, source.dataset, DATA, tmp_path, progress=False).latents(0).numpy().tobytes()
    shard = tmp_path / "shard-00000.safetensors"
    content = shard.read_bytes()
    place = content.index(latents)
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    found = encode(pipe, source.dataset, DATA, tmp_path, progress=False)  # reads no tensor
    assert found.latents(2).isfinite().all()
    for use in (lambda: found.latents(1), lambda: found.text(1, 0), lambda: found.thumbnail(0)):
        with pytest.raises(
            DamagedFileError, match=r"shard-00000.safetensors' is damaged.*remove it and start"
        ):
            use()
    shard.unlink()
    source.loaded.clear()
    assert (
        encode(pipe, source.dataset, DATA, tmp_path, progress=False).latents(0).numpy().tobytes() == latents
    )
    assert source.loaded == [0, 1]


def test_every_flipped_bit_of_a_shard_is_noticed(pipe: Any, tmp_path: Path) -> None:
    """In the header, the descriptions, the tensors or the seal: before use, or at the first."""
    encode(pipe, Examples([example(0)]).dataset, DATA, tmp_path, progress=False)
    shard = tmp_path / "shard-00000.safetensors"
    whole = shard.read_bytes()
    with safe_open(shard, "pt") as file:
        identity = file.metadata()["identity"]
    header = 8 + int.from_bytes(whole[:8], "little")
    positions = {*range(0, header, 5), *range(header, len(whole), 997), *range(len(whole) - 40, len(whole))}
    at_start = 0
    for position in sorted(positions):
        altered = bytearray(whole)
        altered[position] ^= 1 << position % 8
        path = tmp_path / f"{position}.safetensors"
        path.write_bytes(altered)
        read = cache._read_shard(path, identity)
        at_start += read is None
        if read is not None:
            with pytest.raises(DamagedFileError):
                cache.Encodings([read], read).text(0, 0)
        path.unlink()
    assert 0 < at_start < len(positions)


def test_a_shard_is_opened_and_verified_once(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = encode(
        pipe, Examples([example(number) for number in range(4)]).dataset, DATA, tmp_path, progress=False
    )
    opened, verified = [], []
    whole_open, whole_read = cache.safe_open, cache.read_sealed
    monkeypatch.setattr(cache, "safe_open", lambda p, kind: (opened.append(p), whole_open(p, kind))[1])
    monkeypatch.setattr(cache, "read_sealed", lambda p: (verified.append(p), whole_read(p))[1])
    for index in (0, 1, 2, 3, 0, 1):
        found.latents(index)
        found.text(index, 0)
    expected = [tmp_path / f"shard-0000{number}.safetensors" for number in range(2)]
    assert opened == verified == expected


@pytest.mark.parametrize("change", ["model", "files", "resolution", "text"])
def test_a_stale_cache_is_built_again(
    change: str, pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Examples([example(0), example(1)])
    encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    other = tiny.pipeline(seed=1) if change == "model" else pipe
    data = {
        "resolution": DataSettings(resolution=48, shard=2),
        "text": DataSettings(resolution=64, shard=2, text="classes"),
    }
    source = Examples(source.examples, "changed" if change == "files" else "")
    with caplog.at_level(logging.WARNING, logger="seg4diff"):
        encode(other, source.dataset, data.get(change, DATA), tmp_path, progress=False)
    assert source.loaded == [0, 1]
    assert "another model, other data or settings" in caplog.text


def test_an_interrupted_build_goes_on(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = Examples([example(number) for number in range(4)])
    whole_write = Path.write_bytes

    def full_disk(self: Path, data: Any) -> int:
        if "shard-00001" in self.name:
            whole_write(self, bytes(data)[:50])
            raise OSError(errno.ENOSPC, "No space left on device")
        return whole_write(self, data)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_bytes", full_disk)
        with pytest.raises(OSError, match="set data.cache to another folder"):
            encode(pipe, source.dataset, DATA, tmp_path, progress=False)
    assert {path.name for path in tmp_path.iterdir()} == {
        ".lock",
        "empty-prompt.safetensors",
        "shard-00000.safetensors",
    }
    source.loaded.clear()
    assert len(encode(pipe, source.dataset, DATA, tmp_path, progress=False)) == 4
    assert source.loaded == [2, 3]
    encode(pipe, source.dataset, DATA, tmp_path / "whole", progress=False)
    for path in tmp_path.glob("*.safetensors"):
        resumed, whole = load_file(path), load_file(tmp_path / "whole" / path.name)
        assert resumed.keys() == whole.keys()
        assert all(torch.equal(resumed[name], whole[name]) for name in whole.keys() - {cache._SEAL})


def test_a_cache_that_another_run_builds_is_waited_for(pipe: Any, tmp_path: Path) -> None:
    source = Examples([example(0)])
    waiting = threading.Thread(target=encode, args=(pipe, source.dataset, DATA, tmp_path))
    with lock(tmp_path / ".lock"):
        waiting.start()
        waiting.join(timeout=0.5)
        assert waiting.is_alive()
        assert source.loaded == []
    waiting.join(timeout=60)
    assert source.loaded == [0]
    (tmp_path / ".lock").unlink()
    (tmp_path / ".lock").mkdir()  # cannot be locked, as in a folder that is read only
    assert len(encode(pipe, source.dataset, DATA, tmp_path, progress=False)) == 1
    assert source.loaded == [0]


def test_skips_are_counted_also_from_the_cache(
    pipe: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = Examples(["missing file", example(1), "no mask", "no mask"])
    for _ in range(2):
        caplog.clear()
        with caplog.at_level(logging.WARNING, logger="seg4diff"):
            found = encode(pipe, source.dataset, DATA, tmp_path, progress=False)
        assert found.skipped == Counter({"no mask": 2, "missing file": 1})
        assert "1 of 4 images are used; left out: 2 x no mask, 1 x missing file" in caplog.text
    with pytest.raises(ValueError, match="none of the 2 images can be used: 2 x no mask"):
        encode(pipe, Examples(["no mask"] * 2).dataset, DATA, tmp_path, progress=False)


def test_class_words_lost_to_truncation_are_counted(pipe: Any, tmp_path: Path) -> None:
    long = "a cat " + "tree " * 90 + "sofa"
    found = encode(pipe, Examples([example(0, long)]).dataset, DATA, tmp_path, progress=False)
    assert found.skipped[CUT_OFF] == 1
    assert found.text(0, 0).classes.keys() == {"cat"}
    settings = TrainSettings(data=DATA).replaced(data={"held_out": 0.0, "caption_dropout": 0.0})
    sample = TrainingSamples(found, [0], settings)[0]
    assert len(sample.masks[0]) == len(sample.columns[0]) == 1  # the cat's alone


def test_a_prompt_of_classes_keeps_what_fits(pipe: Any, tmp_path: Path) -> None:
    names = [f"name{number}" for number in range(40)]  # several tokens each
    whole = example(0)
    many = Example(whole.name, whole.image, (whole.masks[0],) * 40, tuple(names), ())
    data = DataSettings(resolution=64, text="classes")
    found = encode(pipe, Examples([many]).dataset, data, tmp_path, progress=False)
    kept = found.text(0, 0).classes
    assert 0 < len(kept) < 40
    assert found.skipped[CUT_OFF] == 40 - len(kept)


def test_masks_outside_the_square_are_no_masks(pipe: Any, tmp_path: Path) -> None:
    whole = example(0, size=(200, 64))
    edge = np.zeros((64, 200), bool)
    edge[:, :5] = True
    wide = Example("wide", whole.image, (edge,), ("cat",), ("a cat",))
    with pytest.raises(ValueError, match="1 x no mask on the square"):
        encode(pipe, Examples([wide]).dataset, DATA, tmp_path, progress=False)
    squash = DataSettings(resolution=64, geometry="squash")
    assert len(encode(pipe, Examples([wide]).dataset, squash, tmp_path, progress=False)) == 1


@pytest.mark.parametrize("resolution", [60, 4096])
def test_resolutions_that_do_not_suit(resolution: int, pipe: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"data.resolution={resolution} does not suit this model"):
        encode(
            pipe, Examples([example()]).dataset, DataSettings(resolution=resolution), tmp_path, progress=False
        )


# Samples


@pytest.fixture(scope="module")
def encodings(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    source = Examples([example(number) for number in range(12)])
    return encode(pipe, source.dataset, DATA, tmp_path_factory.mktemp("cache"), progress=False)


def test_split_by_name(encodings: Any, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path)
    training, held_out, _ = split(encodings, settings)
    assert sorted(training + held_out) == list(range(12))
    assert held_out
    assert split(encodings, settings)[1] == held_out
    assert split(encodings, settings.replaced(data={"held_out": 0.0}))[1] == []
    with pytest.raises(ValueError, match="no image is left to train on"):
        split(encodings, settings.replaced(data={"held_out": 0.999, "held_out_limit": 100}))


def test_samples_depend_on_seed_and_position_alone(encodings: Any, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path)
    samples = TrainingSamples(encodings, range(10), settings)
    first = [samples[position] for position in range(25)]
    again = [TrainingSamples(encodings, range(10), settings)[position] for position in (20, 3)]
    for sample, expected in zip(again, (first[20], first[3]), strict=True):
        assert sample.names == expected.names
        assert torch.equal(sample.noise, expected.noise)
        assert torch.equal(sample.sigma, expected.sigma)
    assert sorted(s.names[0] for s in first[:10]) == sorted(f"image-{n}" for n in range(10))
    assert [s.names for s in first[:10]] != [s.names for s in first[10:20]]
    other = TrainingSamples(encodings, range(10), settings.replaced(seed=1))[0]
    assert not torch.equal(other.noise, first[0].noise)


def test_caption_dropout_drops_the_mask_loss_too(encodings: Any, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path, data={"caption_dropout": 0.5})
    samples = [TrainingSamples(encodings, range(10), settings)[position] for position in range(200)]
    empty = encodings.empty_text().arguments["encoder_hidden_states"]
    dropped = [torch.equal(s.text["encoder_hidden_states"][0], empty) for s in samples]
    assert 70 < sum(dropped) < 130
    assert all((len(s.masks[0]) == 0) == drop for s, drop in zip(samples, dropped, strict=True))
    held_out = HeldOutSamples(encodings, range(10), settings)
    assert all(len(held_out[number].masks[0]) for number in range(10))


def test_masks_are_the_largest_first_and_large_enough(pipe: Any, tmp_path: Path) -> None:
    whole = example(0)
    masks = []
    for side in (4, 40, 20):
        mask = np.zeros((64, 64), bool)
        mask[:side, :side] = True
        masks.append(mask)
    several = Example("a", whole.image, tuple(masks), ("", "", ""), ("a cat",))
    found = encode(pipe, Examples([several]).dataset, DATA, tmp_path, progress=False)

    def chosen(**mask: Any) -> list[int]:
        settings = runs.settings(tmp_path, mask={"pairing": "token", **mask}, data={"caption_dropout": 0.0})
        sample = TrainingSamples(found, [0], settings)[0]
        return [int(m.sum()) for m in sample.masks[0]]

    assert chosen() == [1600, 400]
    assert chosen(min_area=0.0) == [1600, 400, 16]
    assert chosen(max_masks=1) == [1600]


def test_positions_share_the_batch() -> None:
    two = [positions(range(6), 1, process=process, processes=2) for process in range(2)]
    one = positions(range(6), 2)
    assert one == [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9], [10, 11]]
    assert [first + second for first, second in zip(*two, strict=True)] == one
    assert positions(range(2, 6), 1, process=1, processes=2) == two[1][2:]


def test_noise_levels(encodings: Any, tmp_path: Path) -> None:
    settings = runs.settings(tmp_path)
    sigma = torch.cat([TrainingSamples(encodings, range(10), settings)[i].sigma for i in range(400)])
    logit = torch.logit(sigma)
    assert abs(float(logit.mean())) < 0.1
    assert abs(float(logit.std()) - 0.5) < 0.06
    shifted = TrainingSamples(encodings, range(10), settings.replaced(noise={"shift": 3.0}))
    for i in range(5):
        torch.testing.assert_close(shifted[i].sigma, 3 * sigma[i : i + 1] / (1 + 2 * sigma[i : i + 1]))


def test_collate(encodings: Any, tmp_path: Path) -> None:
    samples = TrainingSamples(encodings, range(10), runs.settings(tmp_path))
    batch = collate([samples[0], samples[1]])
    assert batch.latents.shape[0] == batch.sigma.shape[0] == len(batch.masks) == len(batch.columns) == 2
    assert torch.equal(batch.noise[1:], samples[1].noise)
