"""Prompted extraction: planted cliques and copies, tiled distances by the pairwise metric, ranks, resume, refusals."""

import csv
import dataclasses
import io
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import networkx as nx
import pytest
import torch
from oracles import MixtureDenoiser
from pair import on_two
from rich.console import Console
from torch import Tensor
from victim import patterns, scene_of

from lightning_mem.attacks import PromptedExtraction, largest_cliques, prompted, tiled_distances
from lightning_mem.attacks.cliques import tightest
from lightning_mem.attacks.prompted_report import Verdict
from lightning_mem.attacks.prompts import read_prompts, with_cfg
from lightning_mem.diffusion import DiffusionProcess, Target
from lightning_mem.evaluation import Scene, Workers
from lightning_mem.metrics import tiled_l2
from lightning_mem.records import Record

MEMBERS, HELDOUT = patterns(6), patterns(6, 1)
SHARES = {"a": (0, 0.06), "b": (1, 0.3), "none": (2, 0.0), "few": (3, 0.03), "control": (4, 0.0)}
"""Prompts of the planted model: a member, and the share of its generations that copy it."""

OPTIONS: dict[str, Any] = {
    "prompts": ["none", "a", "few", "b"], "heldout_prompts": ["control"], "cfg_weight": None, "num_steps": 6,
    "sample_seed": 0, "tiles": 2,
}  # fmt: skip


class Planted:
    """Its condition says which mixture: a share of narrow mass on one member, the rest broad."""

    prediction = "eps"

    def __init__(self) -> None:
        self.process = DiffusionProcess("linear")
        scales = torch.tensor([0.02, 0.6], dtype=torch.float64)
        self.mixtures = [
            MixtureDenoiser(
                torch.stack([MEMBERS[row].double() / 127.5 - 1, torch.zeros(1, 8, 8)]), scales, self.process,
                torch.tensor([share, 1 - share], dtype=torch.float64),
            )
            for row, share in SHARES.values()
        ]  # fmt: skip

    def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
        assert len(condition["which"].unique()) == 1
        return self.mixtures[int(condition["which"][0])](x_t, t)


def conditioner(prompts: Any) -> dict[str, Tensor]:
    return {"which": torch.tensor([list(SHARES).index(prompt) for prompt in prompts])}


def planted_scene(folder: str = "results") -> Scene:
    denoiser = Planted()
    target = Target(denoiser, denoiser.process, (1, 8, 8), digest="planted", conditioner=conditioner)  # type: ignore[arg-type]
    return scene_of(target, MEMBERS, HELDOUT, Path(folder))


@pytest.mark.parametrize("tiles", [1, 2, 4])
def test_tiled_distances_are_those_of_all_pairs_for_any_processes(tiles: int) -> None:
    images, others = patterns(70), patterns(9, 1)
    expected = torch.stack([tiled_l2(images, other, tiles) for other in others], 1)  # type: ignore[misc]
    assert torch.equal(tiled_distances(images, others, tiles), expected)
    assert torch.equal(tiled_distances(images, tiles=tiles), tiled_distances(images, images, tiles))
    parts: list[Tensor] = []
    for rank in range(2):
        workers = Workers(rank, 2, gather=lambda rows: parts.append(rows.clone()) or rows[None])  # type: ignore[func-returns-value]
        tiled_distances(images, others, tiles, workers=workers)
    shared = torch.stack(parts).flatten(0, 1)[:70].div(64 / tiles**2).sqrt() / 255
    assert torch.equal(shared, expected)


def test_one_tile_that_differs_decides() -> None:
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    images[1, :, :2, 2:4] = 255
    assert tiled_distances(images, tiles=4)[0, 1] == 1
    assert tiled_distances(images, tiles=2)[0, 1] == 0.5
    assert tiled_distances(images, tiles=1)[0, 1] == 0.25


def graph_distances(graph: nx.Graph, count: int, seed: int = 0) -> Tensor:
    """Edges get distances below 0.1, all others 0.5."""
    table = torch.full((count, count), 0.5, dtype=torch.float64)
    draw = torch.Generator().manual_seed(seed)
    for a, b in graph.edges:
        table[a, b] = table[b, a] = 0.05 + 0.04 * float(torch.rand(1, generator=draw))
    return table


@pytest.mark.parametrize(("size", "flagged"), [(10, True), (9, False)])
def test_a_planted_clique_among_490_others_is_found(size: int, flagged: bool) -> None:
    graph = nx.gnp_random_graph(500, 0.01, seed=3)
    own = sorted(torch.randperm(500, generator=torch.Generator().manual_seed(1))[:size].tolist())
    graph.add_edges_from((a, b) for a in own for b in own if a < b)
    table = graph_distances(graph, 500)
    found = largest_cliques(table, 0.1)
    assert found[0].vertices == tuple(own)
    assert found[0].exact
    assert [len(c.vertices) for c in found].count(size) == 1
    pairs = [float(table[a, b]) for a in own for b in own if a < b]
    assert found[0].mean_distance == pytest.approx(sum(pairs) / len(pairs))
    assert (len(tightest(found, 10).vertices) >= 10) == flagged  # type: ignore[union-attr]


@pytest.mark.parametrize("seed", range(4))
def test_the_largest_clique_of_each_component_is_networkxs(seed: int) -> None:
    graph = nx.disjoint_union(nx.gnp_random_graph(40, 0.3, seed=seed), nx.gnp_random_graph(30, 0.06, seed=seed))
    table = graph_distances(graph, 70, seed)
    found = largest_cliques(table, 0.1)
    expected = []
    for part in nx.connected_components(graph):
        if len(part) > 1:
            cliques = [sorted(clique) for clique in nx.find_cliques(graph.subgraph(part))]
            most = max(map(len, cliques))

            def mean(clique: list[int]) -> float:
                return float(torch.stack([table[a, b] for a in clique for b in clique if a < b]).mean())

            best = min((c for c in cliques if len(c) == most), key=lambda c: (mean(c), c))
            expected.append(tuple(best))
    assert {clique.vertices for clique in found} == set(expected)
    assert [len(c.vertices) for c in found] == sorted((len(c) for c in expected), reverse=True)


def test_of_two_cliques_the_tighter_one_ranks_and_a_cut_off_search_says_so() -> None:
    graph = nx.disjoint_union_all([nx.complete_graph(5), nx.complete_graph(4), nx.empty_graph(3)])
    table = graph_distances(graph, 12)
    table[5:9, 5:9] = 0.01
    found = largest_cliques(table, 0.1)
    assert [clique.vertices for clique in found] == [(0, 1, 2, 3, 4), (5, 6, 7, 8)]
    assert tightest(found, 4) == found[1]
    assert tightest(found, 5) == tightest(found, 6) == found[0]
    assert tightest([], 2) is None
    spread = table.clone()
    spread[0, 1:5] = spread[1:5, 0] = torch.tensor([0.09, 0.02, 0.09, 0.09], dtype=torch.float64)
    assert largest_cliques(spread, 0.1)[0].medoid(spread) == 2
    assert not largest_cliques(graph_distances(nx.gnp_random_graph(30, 0.5, seed=0), 30), 0.1, limit=3)[0].exact
    assert largest_cliques(torch.full((4, 4), 0.5), 0.1) == []
    with pytest.raises(ValueError, match=r"must be symmetric \[N, N\], got \(3, 2\)"):
        largest_cliques(torch.zeros(3, 2), 0.1)


def named(records: list[Record]) -> dict[str, Record]:
    return {record.name.removeprefix("attack/prompted/"): record for record in records}


def test_planted_copies_among_500_generations_are_found_with_precision_one() -> None:
    attack = PromptedExtraction(**OPTIONS)
    scene = planted_scene()
    assert attack.identity(scene.target, "x", Path("x"))
    found = named(attack.run(scene))
    assert found["flagged"].value == 0.5  # a and b; some copies are too few
    assert (found["flagged"].n, found["flagged_heldout"].n, found["flagged_heldout"].value) == (4, 1, 0)
    assert (found["precision"].value, found["precision"].n) == (1, 2)
    assert (found["precision_heldout"].value, found["images"].value, found["images_heldout"].value) == (0, 2, 0)
    assert found["clique_size"].value > found["clique_size_heldout"].value
    rows = list(csv.DictReader(Path("results/tables/prompts.csv").read_text().splitlines()))
    assert {row["prompt"] for row in rows[:2]} == {"a", "b"}
    assert float(rows[0]["mean_distance"]) < float(rows[1]["mean_distance"])
    assert rows[2]["prompt"] == "few"
    own = {row["prompt"]: row for row in rows}
    assert 10 <= int(own["a"]["largest_clique"]) < 60 < int(own["b"]["largest_clique"]) < 200
    assert (own["a"]["index"], own["b"]["index"], own["few"]["index"]) == ("0", "1", "")
    assert float(own["a"]["nearest"]) < 0.05 < 0.15 < float(own["a"]["nearest_heldout"])
    assert Path("results/images/flagged.png").stat().st_size > 1000


def told(records: list[Record]) -> list[tuple[Any, ...]]:
    """All but what took time."""
    return [(r.name, r.value, r.definition) for r in records if not r.name.endswith("/seconds_per_image")]


def test_evaluations_are_the_calls_of_a_generation() -> None:
    options = {**OPTIONS, "prompts": ["b"], "heldout_prompts": None, "verify": False, "clique_size": 2, "kept": 2}
    for sampler, steps, expected in (("ddim", 3, 3), ("heun", 3, 5)):
        scene = planted_scene(sampler)
        rows = count_rows(scene.target)
        attack = PromptedExtraction(**{**options, "num_generations": 64, "sampler": sampler, "num_steps": steps})
        found = named(attack.run(scene))
        assert found["evaluations"].value == sum(rows) / 64 == expected
        assert found["evaluations"].n == found["seconds_per_image"].n == 64
        assert 0 < found["seconds_per_image"].value < found["seconds_per_image"].seconds / 64
        console = Console(width=80, record=True, file=io.StringIO())
        console.print(attack.table(list(found.values())))
        assert "attack/prompted/evaluations" in console.export_text()


def count_rows(target: Target) -> list[int]:
    """Rows of every call of the target's denoiser from now on."""
    rows: list[int] = []
    denoiser = target.denoiser

    class Counting:
        prediction = denoiser.prediction

        def __call__(self, x_t: Tensor, t: Tensor, condition: Any = None) -> Tensor:
            rows.append(len(x_t))
            return denoiser(x_t, t, condition)

    target.denoiser = Counting()
    return rows


def test_of_a_prompt_nothing_stays_in_memory_but_a_flagged_ones_claim(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: dict[int, int] = {}
    most: list[int] = []
    original = prompted.sample

    def draw(*args: Any, **options: Any) -> Tensor:
        images = original(*args, **options)
        alive[id(images)] = len(images)
        weakref.finalize(images, alive.pop, id(images))
        most.append(sum(alive.values()))
        return images

    monkeypatch.setattr(prompted, "sample", draw)
    found: list[Verdict] = []
    verdict = prompted.PromptedExtraction._prompt
    monkeypatch.setattr(
        PromptedExtraction,
        "_prompt",
        lambda *args: found.append(own := verdict(*args)) or own,  # type: ignore[func-returns-value]
    )
    PromptedExtraction(**{**OPTIONS, "num_generations": 128, "block": 64, "pictures": 0}).run(planted_scene())
    assert len(most) == 2 * 5
    assert max(most) <= 128
    held = [verdict.image.untyped_storage().nbytes() for verdict in found]
    assert held == [64 * verdict.flagged for verdict in found]
    assert 0 < sum(held) < 64 * len(found)


def stop_at(monkeypatch: pytest.MonkeyPatch, seen: list[int], last: int) -> None:
    original: Callable[..., Tensor] = prompted.sample

    def draw(*args: Any, **options: Any) -> Tensor:
        seen.append(int(options["condition"]["which"][0]))
        if len(seen) == last:
            raise RuntimeError("power cut")
        return original(*args, **options)

    monkeypatch.setattr(prompted, "sample", draw)


def test_a_stopped_attack_goes_on_with_the_prompt_it_was_at(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "num_generations": 70, "clique_size": 3, "kept": 2, "pictures": 0}
    whole = PromptedExtraction(**options).run(planted_scene("whole"))
    seen: list[int] = []
    with monkeypatch.context() as patch:
        stop_at(patch, seen, 4)  # prompts take two blocks each
        with pytest.raises(RuntimeError, match="power cut"):
            PromptedExtraction(**options).run(planted_scene())
        again = PromptedExtraction(**options).run(planted_scene())
    assert seen == [2, 2, 0, 0, 0, 0, 3, 3, 1, 1, 4, 4]
    assert told(again) == told(whole)
    before = {path: path.read_bytes() for path in Path("results").glob("samples/prompts/*")}
    third = named(PromptedExtraction(**options).run(planted_scene()))
    assert third["seconds_per_image"].value == named(again)["seconds_per_image"].value  # kept with each prompt
    assert before == {path: path.read_bytes() for path in Path("results").glob("samples/prompts/*")}
    with pytest.raises(ValueError, match="holds another draw .* choose another --out"):
        PromptedExtraction(**{**options, "num_steps": 5}).run(planted_scene())


def test_two_processes_share_every_prompt_and_get_the_records_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {**OPTIONS, "prompts": ["b", "few"], "num_generations": 150, "clique_size": 5, "pictures": 0}
    alone = PromptedExtraction(**options).run(planted_scene("alone"))
    drawn: list[int] = []
    original = prompted.sample

    def draw(target: Target, rows: Tensor, **given: Any) -> Tensor:
        drawn.append(len(rows))
        return original(target, rows, **given)

    monkeypatch.setattr(prompted, "sample", draw)
    found = on_two(planted_scene("together"), PromptedExtraction(**options).run)
    assert told(found[0]) == told(found[1]) == told(alone)
    assert sorted(drawn) == [22] * 3 + [64] * 9  # three prompts of three blocks: each process two, the last one twice
    rows = [Path(folder, "tables/prompts.csv").read_text() for folder in ("alone", "together")]
    assert rows[0] == rows[1]


def test_training_images_are_not_read_where_nothing_is_verified() -> None:
    def read() -> Any:
        raise PermissionError

    options = {**OPTIONS, "num_generations": 64, "prompts": ["b"], "verify": False}
    found = named(PromptedExtraction(**options).run(dataclasses.replace(planted_scene(), read=read)))
    costs = {"evaluations", "seconds_per_image"}
    assert set(found) == {"flagged", "flagged_heldout", "clique_size", "clique_size_heldout", *costs}
    assert found["flagged"].value == 1
    with pytest.raises(PermissionError):
        PromptedExtraction(**{**options, "verify": True}).run(dataclasses.replace(planted_scene(), read=read))


def test_prompts_are_read_from_lists_and_files_each_once() -> None:
    Path("lines.txt").write_text("a cat\na dog\na cat\n")
    Path("table.csv").write_text('file,caption\n1.png,"a cat, asleep"\n2.png,a dog\n')
    assert read_prompts("lines.txt") == read_prompts(["a cat", "a dog", "a cat"]) == ["a cat", "a dog"]
    assert read_prompts("table.csv") == ["a cat, asleep", "a dog"]
    assert read_prompts(None) == []
    Path("gap.csv").write_text("file,caption\n1.png,a cat\n2.png,\n")
    Path("other.csv").write_text("file\n1.png\n")
    for given, message in (
        ("gap.csv", "gap.csv has no caption in row 2"),
        ("other.csv", r"other.csv must have a column caption, prompt, text, got \['file'\]"),
        ("nowhere.txt", "there is no file nowhere.txt"),
    ):
        with pytest.raises(ValueError, match=message):
            read_prompts(given)


def test_what_cannot_be_prompted_is_refused() -> None:
    for options, message in (
        ({"prompts": []}, "prompts must name at least one prompt, got none"),
        ({"heldout_prompts": ["a"]}, "1 prompts are in prompts and in heldout_prompts, such as 'a'"),
        ({"num_generations": 9}, "clique_size 10 is more than the 9 generations"),
        ({"delta_edge": 0.0}, r"delta_edge and delta must lie in \(0, 1\), got 0.0"),
        ({"clique_size": 1}, "clique_size must be at least 2, got 1"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptedExtraction(**{**OPTIONS, **options})
    target = planted_scene().target
    with pytest.raises(ValueError, match="cfg_weight 7.5 needs a text-to-image model"):
        with_cfg(target, 7.5)
    with pytest.raises(ValueError, match="cannot be cut into 3x3 equal tiles"):
        PromptedExtraction(**{**OPTIONS, "tiles": 3}).identity(target, "x", Path("x"))
    target.conditioner = None
    with pytest.raises(ValueError, match="need a model with a text encoder"):
        PromptedExtraction(**OPTIONS).identity(target, "x", Path("x"))
    target.num_classes = 3
    assert PromptedExtraction(**{**OPTIONS, "prompts": ["2"], "heldout_prompts": None}).identity(target, "", Path())
    with pytest.raises(ValueError, match="labels from 0 to 2, got '3'"):
        PromptedExtraction(**{**OPTIONS, "prompts": ["3"], "heldout_prompts": None}).identity(target, "", Path())
