"""The search over tiles on a virtual GPU with noise: the planted best is found, what is wrong or no faster is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import msgspec
import pytest
from tokenfab.bench import record as record_module
from tokenfab.bench.case import Anchor
from tokenfab.bench.device import MethodUnavailable
from tokenfab.bench.gpus import get_gpu
from tokenfab.bench.measurement import Measurement, Settings
from tokenfab.bench.noise import MAX_A_A
from tokenfab.bench.record import Record, environment
from tokenfab.bench.records import RecordStore
from tokenfab.bench.targets import Target
from tokenfab.bench.timing import measure
from tokenfab.bench.tune import FINALISTS, MIN_KEPT, Round, Searched, Trials, anchor_name, decide, search
from tokenfab.bench.tune_prune import Candidate, Pruned
from tokenfab.bench.tune_space import place_of
from tokenfab.kernels.registry import find_kernels
from tokenfab.kernels.tiles import Tile
from tokenfab.tests.bench.fake_device import Buffer, FakeDevice, Launch, honest, make_case, product, random_buffer

H100 = get_gpu("h100")
QUICK = Settings(min_warm_up_s=0.5, max_warm_up_s=0.6, budget_s=0.2, max_ci=0.05, energy_s=None)
ROUNDS = (
    Round("first", QUICK, 0.5),
    Round("second", msgspec.structs.replace(QUICK, max_ci=0.04), 0.7),
    Round("final", msgspec.structs.replace(QUICK, max_ci=0.03), 1.0),
)
WEIGHTS = 1_500_000_000
"""0.5 ms of the virtual GPU per call."""

DEFAULT = Tile(64, 128, 128, 8, 3)
TILES = [Tile(64, n, 128, 4, stages) for n in (64, 128, 256) for stages in (2, 3, 4, 5, 6)]
SHAPE = (("m", 64), ("n", 2112), ("k", 7168))


def pruned(tiles: list[Tile] = TILES) -> Pruned:
    kernel = find_kernels("gemm", ["fp8_block"])[0]
    place = place_of(kernel, dict(SHAPE), "sm_90")
    assert place.default == DEFAULT
    survivors = [Candidate(tile, (), 1e-6, 1e-6, 1e-6, 1, 1, 1.0, 1) for tile in (*tiles, DEFAULT)]
    return Pruned(Target(kernel, SHAPE, ("somewhere",)), place, tuple(survivors), ())


def wrong(device: FakeDevice, weights: Buffer, activations: Buffer, output: Buffer) -> None:
    def effect() -> None:
        output.values[:] = [1.2 * value for value in product(weights, activations)]

    device.enqueue(Launch([weights, activations], [output], effect))


@dataclass
class Lab:
    """A folder of records, and a virtual GPU whose time depends on the tile.

    extra: seconds of a tile's call beyond the bytes'; wrong: tiles with a wrong output; drift: of one process's clock.
    """

    folder: Path
    extra: Callable[[Tile], float]
    wrong: frozenset[Tile] = frozenset()
    errors: dict[Tile, Exception] = field(default_factory=dict)
    noise: float = 0.004
    die_after: int = 1 << 30
    anchor_factor: float = 1.0
    process_factor: Callable[[int, Tile], float] = lambda process, tile: 1.0
    seen: list[tuple[int, str, Tile]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.folder.mkdir(exist_ok=True)
        self.store = RecordStore(self.folder, "h100-tune.jsonl")
        self.what = pruned()
        self.here = environment(FakeDevice().properties)

    def trials(self) -> Trials:
        return Trials(self.what, H100, self.here, ROUNDS, self.store.records())

    def run(self, process: int, is_over: Callable[[float], bool] = lambda share: False) -> Searched:
        device = FakeDevice(seed=100 * process + len(self.seen), noise=self.noise)
        source, target = random_buffer(WEIGHTS, 1 << 20), Buffer(1000, [0.0])
        own_s = self.anchor_factor * self.extra(DEFAULT)

        def anchor() -> None:
            device.enqueue(Launch([source], [target], lambda: None, work_s=own_s))

        def measured(tile: Tile, settings: Settings) -> Measurement:
            self.seen.append((process, next(each.name for each in ROUNDS if each.settings == settings), tile))
            if len(self.seen) > self.die_after:
                raise KeyboardInterrupt
            if tile in self.errors:
                raise self.errors[tile]
            work_s = self.extra(tile) * self.process_factor(process, tile)

            def kernel(device: FakeDevice, *buffers: Buffer) -> None:
                (wrong if tile in self.wrong else honest)(device, *buffers)
                launches = device.capturing
                if launches:
                    launches[-1].work_s = work_s

            case = make_case(device, kernel, weight_bytes=WEIGHTS)
            return measure(case, device, anchor=Anchor(anchor_name(self.what), anchor), settings=settings)

        return search(self.trials(), self.store, measured, process=process, is_over=is_over)

    def all(self, processes: int = 3) -> None:
        """Every pass, each as a process of its own."""
        for process in range(1, processes + 1):
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(record_module, "_TOKEN", f"process{process}")
                self.run(process)


def planted(best: Tile, gain_s: float = 100e-6) -> Callable[[Tile], float]:
    """The default takes 200 us beyond the bytes' 500, ``best`` so much less, the others more."""

    def extra(tile: Tile) -> float:
        if tile == DEFAULT:
            return 200e-6
        return 200e-6 - gain_s if tile == best else 250e-6 + 20e-6 * TILES.index(tile)

    return extra


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    lab = Lab(tmp_path_factory.mktemp("searched"), planted(TILES[11]), wrong=frozenset([TILES[4]]))
    wrong_and_fast = lab.extra
    lab.extra = lambda tile: 20e-6 if tile == TILES[4] else wrong_and_fast(tile)
    lab.all()
    return lab


def test_the_planted_best_is_adopted_with_its_gain(searched: Lab) -> None:
    verdict = decide(searched.trials())
    assert verdict.adopted == TILES[11]
    assert verdict.best is not None
    assert verdict.default is not None
    assert verdict.best.tile == TILES[11]
    assert verdict.gain == pytest.approx(1 - 600 / 700, abs=0.01)
    assert verdict.noise is not None
    assert verdict.gain is not None
    assert MAX_A_A <= verdict.noise < verdict.gain
    assert verdict.default.ratio == pytest.approx(1.0, abs=0.01)
    assert len(verdict.best.ratios) == 3
    assert verdict.saved_s == pytest.approx(100e-6, rel=0.1)
    assert verdict.reason.startswith("faster by 14")


def test_rounds_halve_and_the_default_is_in_every_one(searched: Lab) -> None:
    trials = searched.trials()
    first, second, final = (trials.entrants(index) for index in range(3))
    assert len(first) == 16
    assert len(second) == 1 + max(MIN_KEPT, 5)
    assert len(final) == 1 + FINALISTS
    assert {each[0] for each in (first, second, final)} == {DEFAULT}
    assert set(final) <= set(second) <= set(first)
    measured = [(process, name) for process, name, _ in searched.seen]
    assert measured.count((1, "first")) == 16
    assert measured.count((1, "second")) == 7
    assert [measured.count((process, "final")) for process in (1, 2, 3)] == [4, 4, 4]
    assert len(measured) == 16 + 7 + 12


def test_a_wrong_tile_is_out_however_fast(searched: Lab) -> None:
    trials = searched.trials()
    assert trials.fault(TILES[4]).startswith("check: before timing")
    assert TILES[4] not in trials.entrants(1)
    (wrong_record,) = trials.records(TILES[4], ROUNDS[0])
    assert wrong_record.time_s is None


def test_every_measurement_is_a_record_with_its_tile(searched: Lab) -> None:
    records = list(searched.store.records())
    assert len(records) == len(searched.seen)
    assert [record.point.tile for record in records] == [asdict(tile) for _, _, tile in searched.seen]
    assert len({record.point.key for record in records}) == 16
    assert {record.measurement.anchor for record in records} == {anchor_name(searched.what)}


def test_what_is_recorded_is_not_measured_again(searched: Lab) -> None:
    before = len(searched.seen)
    assert searched.run(3) == Searched(True, {})
    assert searched.run(1).is_whole
    assert len(searched.seen) == before


def other_records(lab: Lab, change: Callable[[Record], Record]) -> Trials:
    return Trials(lab.what, H100, lab.here, ROUNDS, [change(record) for record in lab.store.records()])


def test_records_of_other_software_kernels_and_anchors_do_not_count(searched: Lab) -> None:
    def point(record: Record) -> Record:
        return msgspec.structs.replace(record, point=msgspec.structs.replace(record.point, kernel_hash="0" * 64))

    def software(record: Record) -> Record:
        return msgspec.structs.replace(record, environment=msgspec.structs.replace(record.environment, triton="9"))

    def gpu(record: Record) -> Record:
        return msgspec.structs.replace(record, point=msgspec.structs.replace(record.point, gpu="h200"))

    def anchor(record: Record) -> Record:
        facts = msgspec.structs.replace(record.measurement, anchor="another default")
        return msgspec.structs.replace(record, measurement=facts)

    assert other_records(searched, lambda record: record).num_processes(DEFAULT, ROUNDS[2]) == 3
    for change in (point, software, gpu, anchor):
        assert other_records(searched, change).num_processes(DEFAULT, ROUNDS[2]) == 0
        assert other_records(searched, change).records(DEFAULT, ROUNDS[0]) == []


def test_settings_tell_the_rounds_apart(searched: Lab) -> None:
    trials = searched.trials()
    assert [len(trials.records(DEFAULT, each)) for each in ROUNDS] == [1, 1, 3]
    assert trials.num_processes(DEFAULT, ROUNDS[2]) == 3


# -- within the noise ------------------------------------------------------------------------------


def final_only(lab: Lab, tile: Tile) -> Lab:
    """A search among two tiles."""
    lab.what = pruned([tile])
    return lab


def test_a_gain_within_the_noise_is_not_adopted(tmp_path: Path) -> None:
    lab = final_only(Lab(tmp_path, lambda tile: 200e-6 if tile == DEFAULT else 196e-6, noise=0.001), TILES[0])
    lab.all()
    verdict = decide(lab.trials())
    assert verdict.adopted is None
    assert verdict.best is not None
    assert verdict.gain is not None
    assert 0 < verdict.gain < MAX_A_A
    assert verdict.reason.startswith("the gain of 0.")
    assert verdict.saved_s == 0.0


def test_a_spread_between_processes_is_noise(tmp_path: Path) -> None:
    """Faster by 4 % of the whole in two processes, slower in the third."""
    lab = final_only(Lab(tmp_path, lambda tile: 200e-6 if tile == DEFAULT else 172e-6, noise=0.001), TILES[0])
    lab.process_factor = lambda process, tile: 1.3 if process == 2 and tile != DEFAULT else 1.0
    lab.all()
    verdict = decide(lab.trials())
    assert verdict.adopted is None
    assert verdict.gain == pytest.approx(0.04, abs=0.01)
    assert verdict.noise is not None
    assert verdict.noise > 0.05
    assert "within the noise" in verdict.reason


def test_the_default_stays_where_it_is_the_fastest(tmp_path: Path) -> None:
    lab = final_only(Lab(tmp_path, lambda tile: 200e-6 if tile == DEFAULT else 260e-6), TILES[0])
    lab.all()
    verdict = decide(lab.trials())
    assert (verdict.adopted, verdict.reason) == (None, "the default is the fastest")
    assert verdict.gain is not None
    assert verdict.gain < 0


def test_the_gain_is_over_the_default_as_measured_not_as_anchor(tmp_path: Path) -> None:
    """The launches beside it are slower, on whatever buffers: both tiles profit alike."""
    lab = final_only(Lab(tmp_path, lambda tile: 200e-6, noise=0.001, anchor_factor=2.0), TILES[0])
    lab.all()
    verdict = decide(lab.trials())
    assert verdict.default is not None
    assert verdict.default.ratio == pytest.approx(700 / 900, abs=0.01)
    assert verdict.gain == pytest.approx(0, abs=0.01)
    assert verdict.adopted is None


def test_no_verdict_before_the_final_is_complete(tmp_path: Path) -> None:
    lab = final_only(Lab(tmp_path, planted(TILES[0])), TILES[0])
    lab.all(processes=2)
    verdict = decide(lab.trials())
    assert (verdict.adopted, verdict.gain) == (None, None)
    assert "not measured in 3 processes" in verdict.reason
    with pytest.raises(ValueError, match="processes: expected at least 3; got 2"):
        decide(lab.trials(), 2)


def test_a_wrong_default_adopts_nothing(tmp_path: Path) -> None:
    lab = final_only(Lab(tmp_path, planted(TILES[0]), wrong=frozenset([DEFAULT])), TILES[0])
    lab.all()
    verdict = decide(lab.trials())
    assert verdict.adopted is None
    assert verdict.reason.startswith("nothing to compare with: the default tile: check:")


def test_a_tile_found_wrong_only_in_the_last_process_is_out(tmp_path: Path) -> None:
    lab = final_only(Lab(tmp_path, planted(TILES[0])), TILES[0])
    lab.all(processes=2)
    lab.wrong = frozenset([TILES[0]])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "_TOKEN", "process3")
        lab.run(3)
    verdict = decide(lab.trials())
    assert (verdict.adopted, verdict.reason) == (None, "no other tile is left")


# -- time, errors, and ends ------------------------------------------------------------------------


def test_what_a_tile_cannot_do_stops_no_other(tmp_path: Path) -> None:
    class OutOfResources(Exception):
        pass

    errors: dict[Tile, Exception] = {TILES[0]: MethodUnavailable("too small"), TILES[1]: OutOfResources("shared\nmore")}
    lab = Lab(tmp_path, planted(TILES[2]), errors=errors)
    lab.what = pruned(TILES[:3])
    assert lab.run(1).skipped == {
        TILES[0]: "MethodUnavailable: too small",
        TILES[1]: "OutOfResources: shared",
    }
    assert lab.trials().entrants(2) == [DEFAULT, TILES[2]]
    lab.errors = {TILES[0]: RuntimeError("illegal memory access")}
    with pytest.raises(RuntimeError, match="illegal memory access"):
        lab.run(1)


def test_time_that_is_up_ends_a_round_with_what_it_has(tmp_path: Path) -> None:
    lab = Lab(tmp_path, planted(TILES[1]))
    shares: list[float] = []

    def is_over(share: float) -> bool:
        shares.append(share)
        return share < 1 and len(lab.seen) >= 4

    assert not lab.run(1, is_over).is_whole
    assert [tile for _, name, tile in lab.seen if name == "first"] == [DEFAULT, *TILES[:3]]
    assert [name for _, name, _ in lab.seen].count("second") == 0
    assert set(shares) <= {0.5, 0.7, 1.0}
    finalists, again = lab.trials().entrants(2), len(lab.seen)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(record_module, "_TOKEN", "process2")
        lab.run(2)
    assert lab.seen[again:] == [(2, "final", tile) for tile in finalists]
    again = len(lab.seen)
    assert lab.run(1).is_whole
    assert [tile for _, name, tile in lab.seen[again:] if name == "first"] == TILES[3:]


@pytest.mark.parametrize("die_after", [3, 17, 24, 29])
def test_r21_a_killed_search_goes_on_to_the_same_set(tmp_path: Path, die_after: int) -> None:
    whole, lab = (Lab(tmp_path / name, planted(TILES[7])) for name in ("whole", "killed"))
    lab.die_after = die_after
    with pytest.raises(KeyboardInterrupt):
        lab.all()
    assert len(list(lab.store.records())) == die_after
    lab.die_after = 1 << 30
    lab.all()
    whole.all()

    def measured(each: Lab) -> list[tuple[tuple[int, ...], float]]:
        records = each.store.records()
        return sorted((tuple(r.point.tile.values()), r.measurement.settings.max_ci) for r in records)  # type: ignore[misc]

    assert measured(lab) == measured(whole)
    assert decide(lab.trials()).adopted == decide(whole.trials()).adopted == TILES[7]
