import json
import math
from pathlib import Path

import pytest
import torch

from dinov2_custom.train.health import BadImageLog, LearningAlarm, flat_dino_loss, rankme
from dinov2_custom.train.ssl_meta_arch import SSLMetaArch
from tests.train.batches import random_batch, tiny_config

FLAT_LOSS = math.log(256)  # of runs with local crops
RECORDED = json.loads(Path(__file__).with_name("verdict_rows.json").read_text())
EXPECTED = {  # name -> (first verdict, whether it started from trained weights)
    "good": ("", False),
    "first iterations with centering": ("", False),  # few prototypes until the centre has settled
    "learning rate x 30": ("exploding", False),
    "teacher temperature 1": ("uniform", False),
    "one prototype: centering, temperature 0.01": ("single_prototype", False),
    "trained weights, learning rate x 5": ("worse_than_start", True),
    "trained weights, learning rate x 10": ("worse_than_start", True),
    "trained weights, learning rate / 4": ("", True),  # three evaluations are below the start
}
ISSUE_1 = {"loss": [6.931] * 27, "teacher": [6.931] * 27, "prototype": [6.931] * 27, "rank": [1.0] * 27}
ISSUE_2 = {
    "loss": [0.997 * math.log(256)] * 51 + [0.98 * math.log(256)] * 10,
    "teacher": [0.96 * math.log(256)] * 61,
    "prototype": [math.log(256)] * 61,
    "rank": [10.0] * 61,
}
# configs/quickstart.yaml for 300 steps, first on 320 microscope images (kNN does not rise), then on its own tiles
BLOOD_CELLS = {
    "loss": [7.361, 6.743, 6.584, 6.308, 6.1, 5.762, 5.624, 5.566, 5.543, 5.53, 5.523, 5.522, 5.519, 5.518, 5.513,
             5.506, 5.503, 5.497, 5.491, 5.492, 5.488, 5.482, 5.486, 5.487, 5.48, 5.477, 5.483, 5.472, 5.474, 5.479,
             5.479],
    "teacher": [3.625, 3.625, 3.973, 4.55, 4.893, 5.034, 5.088, 5.161, 5.191, 5.265, 5.329, 5.305, 5.305, 5.322, 5.322,
                5.31, 5.31, 5.283, 5.283, 5.288, 5.269, 5.269, 5.278, 5.266, 5.266, 5.276, 5.276, 5.284, 5.284, 5.271,
                5.271],
    "prototype": [5.364, 5.364, 5.373, 5.406, 5.543, *[5.545] * 26],
    "rank": [6.4, 6.4, 6.6, 6.6, 7.5, 8.8, 10.4, 11.5, 12.9, 14.1, 15.3, 15.7, 16.6, 17.1, 17.6, 17.9, 18.0, 18.8, 18.9,
             18.9, 19.1, 19.2, 19.8, 19.8, 19.8, 19.9, 19.7, 19.7, 20.1, 20.2, 20.4],
}  # fmt: skip
TILES = {
    "loss": [7.129, 6.861, 6.3, 5.751, 5.39, 5.196, 5.107, 5.102, 5.109, 5.111, 5.108, 5.099, 5.107, 5.104, 5.097, 5.09,
             5.088, 5.082, 5.06, 5.057, 5.051, 5.044, 5.036, 5.032, 5.014, 4.997, 5.001, 5.017, 5.011, 5.005, 4.975],
    "teacher": [3.772, 3.772, 4.024, 4.037, 4.11, 4.278, 4.317, 4.478, 4.478, 4.558, 4.547, 4.547, 4.62, 4.649, 4.617,
                4.614, 4.568, 4.552, 4.552, 4.61, 4.53, 4.523, 4.523, 4.556, 4.525, 4.469, 4.46, 4.46, 4.576, 4.509,
                4.502],
    "prototype": [5.525, 5.509, 5.509, 5.483, 5.39, 5.39, 5.39, 5.39, *[5.48] * 23],
    "rank": [6.5, 6.4, 6.4, 7.4, 7.9, 9.0, 10.3, 11.2, 12.1, 13.8, 15.5, 16.2, 17.2, 18.4, 19.2, 19.3, 19.7, 20.2, 20.3,
             20.3, 20.7, 21.3, 20.8, 20.7, 20.7, 21.4, 21.2, 21.2, 21.2, 21.2, 21.4],
}  # fmt: skip
# configs/small.yaml on the same 320 images, the first 420 of 800 iterations: at ln K until 240, kNN .48 -> .67
LATE = {
    "loss": [6.249, 6.022, 5.802, 5.709, 5.591, 5.56, 5.548, 5.542, 5.54, 5.537, 5.532, 5.531, 5.531, 5.528, 5.525,
             5.521, 5.523, 5.527, 5.519, 5.514, 5.513, 5.506, 5.501, 5.497, 5.49, 5.473, 5.475, 5.466, 5.451, 5.453,
             5.446, 5.418, 5.408, 5.406, 5.391, 5.379, 5.385, 5.373, 5.373, 5.363, 5.344, 5.347],
    "teacher": [4.349, 4.349, 4.573, 4.58, 4.703, 4.895, 5.009, 4.982, 4.974, 4.974, 5.003, 5.08, 5.046, 5.046, 5.133,
                5.158, 5.176, 5.201, 5.201, 5.233, 5.233, 5.168, 5.168, 5.218, 5.193, 5.144, 5.141, 5.14, 5.125,
                5.106, 5.083, 5.083, 5.069, 5.016, 5.009, 4.928, 4.928, 4.944, 4.944, 4.964, 4.948, 4.904],
    "prototype": [5.526, 5.495, 5.495, 5.525, 5.532, 5.544, 5.545, 5.545, 5.545, 5.545, 5.545, 5.545, 5.545, 5.545,
                  5.545, 5.544, 5.544, 5.545, 5.544, 5.544, 5.545, 5.544, 5.544, 5.544, 5.545, 5.544, 5.544, 5.544,
                  5.544, 5.545, 5.542, 5.539, 5.539, 5.543, 5.539, 5.539, 5.541, 5.541, 5.537, 5.533, 5.533, 5.542],
    "rank": [7.5, 7.0, 7.0, 8.5, 9.8, 11.6, 11.6, 13.1, 13.9, 15.0, 15.4, 16.1, 16.2, 16.8, 17.2, 17.6, 17.8, 18.4,
             18.4, 18.6, 19.1, 19.1, 20.1, 20.1, 20.7, 20.8, 20.8, 21.3, 21.3, 21.6, 21.8, 22.0, 22.3, 22.4, 22.4,
             22.2, 22.2, 22.5, 22.5, 22.6, 22.6, 22.6],
}  # fmt: skip


def rows(series, every=10):
    """Return rows in the format of training_metrics.json."""
    columns = zip(*(series[key] for key in ("loss", "teacher", "prototype", "rank")), strict=True)
    return [
        {
            "iteration": every * index,
            "dino_local_crops_loss": loss * 0.8,
            "dino_global_crops_loss": loss * 0.2,
            "teacher_entropy": teacher,
            "prototype_entropy": prototype,
            "rankme": rank,
        }
        for index, (loss, teacher, prototype, rank) in enumerate(columns)
    ]


def alarm_for(prototypes, total):
    return LearningAlarm(prototypes, math.log(prototypes), lambda iteration: total)


def alarms(series, prototypes, total, every=10):
    """Return {iteration: kinds warned about}, and the warnings repeated at the end."""
    alarm = alarm_for(prototypes, total)
    found = {row["iteration"]: kinds for row in rows(series, every) if (kinds := alarm.check(row, total))}
    return found, list(alarm.final_verdicts().values())


@pytest.mark.parametrize(
    ("series", "prototypes", "total", "at", "kind", "reason"),
    [
        (ISSUE_1, 1024, 260, 90, "uniform", "the features of all images are nearly the same"),
        (ISSUE_2, 256, 600, 120, "no_progress", "the student cannot predict"),
        (BLOOD_CELLS, 256, 300, 140, "no_progress", "the student cannot predict"),
    ],
)
def test_a_run_that_does_not_learn_is_warned_of_once_and_at_the_end(series, prototypes, total, at, kind, reason):
    found, (again,) = alarms(series, prototypes, total)
    assert found == {at: [kind]}
    assert "the run does not learn" in again and reason in again
    assert "configs/small.yaml" in again and "docs/monitoring.md" in again
    alarm = LearningAlarm(prototypes, math.log(prototypes), lambda iteration: total, name_recipe=False)
    alarm.read(rows(series))
    assert all("small.yaml" not in words and "docs/monitoring.md" in words for words in alarm.called.values())


@pytest.mark.parametrize(("series", "total"), [(TILES, 300), (LATE, 800)])
def test_a_run_that_learns_is_silent(series, total):
    assert alarms(series, 256, total) == ({}, [])


def long_run(flat_share, falling):
    """Return 1000 rows for 65,536 prototypes: at ln K for a share of the run, then down to .8 of it."""
    uniform, flat = math.log(65536), round(1000 * flat_share)
    loss = [1.0] * flat + [max(0.8, 1 - 0.002 * i) for i in range(1000 - flat)]
    teacher = [max(0.5, 1 - falling * i) for i in range(1000)]
    columns = {"loss": loss, "teacher": teacher, "prototype": [0.99] * 1000}
    return {key: [uniform * v for v in column] for key, column in columns.items()} | {"rank": [40.0] * 1000}


@pytest.mark.parametrize(
    ("flat_share", "falling", "is_silent"),
    [(0.1, 0.0, True), (0.19, 0.0, True), (0.22, 0.0, False), (0.3, 0.001, True), (0.45, 0.001, False)],
)
def test_the_beginning_at_ln_k_may_be_a_fifth_of_the_run_and_twice_that_while_the_teacher_decides(
    flat_share, falling, is_silent
):
    found, again = alarms(long_run(flat_share, falling), 65536, 100_000, every=100)
    assert (found == {}) == is_silent
    assert again == []  # it learned in the end


def test_a_collapse_after_learning_needs_ten_rows():
    loss = [5.5, 5.0, 4.5, *[5.54] * 4, 4.6, *[5.54] * 12]
    series = {"loss": loss, "teacher": [5.5] * 20, "prototype": [5.5] * 20, "rank": [12.0] * 20}
    found, (again,) = alarms(series, 256, 100_000)
    assert found == {170: ["uniform"]} and "has collapsed" in again


def at_share(share, count=100):
    """Return a run whose loss and assignments fall to a share of ln(256) at row 10, and stay there."""
    series = [1.0 - (1 - share) * min(i, 10) / 10 for i in range(count)]
    return {"loss": [math.log(256) * v for v in series], "teacher": [math.log(256) * v for v in series]} | {
        "prototype": [math.log(256)] * count,
        "rank": [10.0] * count,
    }


def test_assignments_just_below_the_even_spread_are_called_before_a_quarter_and_at_the_end():
    for share in (0.985, 1.0):
        found, (again,) = alarms(at_share(share), 256, 1000)
        assert found == {200: ["uniform"]} and "lower teacher.teacher_temp" in again
    assert alarms(at_share(0.9), 256, 1000) == ({}, [])


def test_the_end_names_a_cause_that_was_called_after_its_effect_without_the_effect():
    uniform = math.log(256)
    teacher = [0.95 * uniform] * 40 + [uniform] * 60
    series = {"loss": [uniform] * 100, "teacher": teacher, "prototype": [uniform] * 100, "rank": [10.0] * 100}
    alarm = alarm_for(256, 1000)
    kinds = [kind for row in rows(series) for kind in alarm.check(row, 1000)]
    assert kinds == ["no_progress", "uniform"] and list(alarm.final_verdicts()) == ["uniform"]


def test_a_loss_that_stops_falling_before_it_has_learned_anything_is_no_progress():
    stuck = at_share(0.978) | {"teacher": [0.9 * math.log(256)] * 100}
    assert list(alarms(stuck, 256, 1000)[0].values()) == [["no_progress"]]
    _, (again,) = alarms(stuck | {"loss": [*stuck["loss"][:-1], math.log(256)]}, 256, 1000)
    assert "from iteration=0 to 990" in again  # the long stretch, not the last row, which is at ln K
    slow = stuck | {"loss": [math.log(256) * (1 - 0.0004 * i) for i in range(100)]}
    assert alarms(slow, 256, 2500) == ({}, [])  # it still falls


def evaluated(knn, start, at=range(0, 1000, 50), key="knn"):
    """Return rows of a run that learns, with an evaluation in each row."""
    good = {"loss": [4.0] * 20, "teacher": [4.0] * 20, "prototype": [5.5] * 20, "rank": [12.0] * 20}
    values = zip(rows(good), knn, at, strict=False)
    return [row | {"iteration": i, f"eval_{key}": value, f"start_{key}": start} for row, value, i in values]


def called(some, **options):
    alarm = LearningAlarm(256, math.log(256), lambda iteration: 1000, **options)
    return [(row["iteration"], kind) for row in some for kind in alarm.check(row, 1000)], list(alarm.final_verdicts())


def test_features_that_stay_below_those_of_the_start_are_called_while_a_dip_is_not():
    worse = [0.41, 0.43, 0.42, 0.42, 0.43]
    assert called(evaluated(worse, 0.52)) == ([(150, "worse_than_start")], ["worse_than_start"])
    for fine in ([0.40, 0.44, 0.48, 0.53, 0.55], [0.51, 0.51, 0.51, 0.51], [0.4, 0.4, 0.4, 0.53, 0.4, 0.4, 0.4, 0.55]):
        assert called(evaluated(fine, 0.52)) == ([], [])
    fallen = called(evaluated([9.0, 8.0, 8.0, 8.0], 20.0, key="rankme"))
    assert fallen == ([(150, "worse_than_start")], ["worse_than_start"])
    assert called(evaluated([12.0, 11.0, 11.0, 11.0], 20.0, key="rankme")) == ([], [])
    better_again = called(evaluated([*worse, 0.53], 0.52))
    assert better_again == ([(150, "worse_than_start")], [])  # no longer true at the end


def test_few_labelled_images_leave_room_for_chance():
    """1 / sqrt(number of images), two standard errors of an accuracy of one half."""
    values, start = [0.46] * 5, 0.52  # .06 below
    verdict = [(150, "worse_than_start")]
    for images, expected in ((250, []), (300, verdict), (100_000, verdict)):
        some = [row | {"knn_images": images} for row in evaluated(values, start)]
        assert called(some)[0] == expected, images
    little = [row | {"knn_images": 100_000} for row in evaluated([0.505] * 5, start)]
    assert called(little)[0] == []  # however many images


def test_no_progress_below_the_features_of_the_start_advises_a_lower_learning_rate():
    loss = {"dino_local_crops_loss": 0.8 * FLAT_LOSS, "dino_global_crops_loss": 0.2 * FLAT_LOSS}
    advice = {}
    for name, knn in (("worse", 0.41), ("equal", 0.53)):
        alarm = LearningAlarm(256, FLAT_LOSS, lambda iteration: 1000, trained_start=True)
        alarm.has_learned = True
        for row in evaluated([knn] * 12, 0.52, at=range(0, 120, 10)):
            alarm.check(row | loss, 1000)
        advice[name] = alarm.called["no_progress"]
    assert "worse than those that it started from" in advice["worse"] and "lower optim.base_lr" in advice["worse"]
    assert "worse" not in advice["equal"] and "crops.global_crops_scale" in advice["equal"]


def test_a_flat_loss_is_no_progress_unless_knn_is_above_its_start():
    stuck = at_share(0.978) | {"teacher": [0.9 * math.log(256)] * 100}
    for knn, expected in ((0.52, ["no_progress"]), (0.56, [])):  # with 1,000 images, .03 may be chance
        some = rows(stuck)
        some[20] |= {"eval_knn": knn, "start_knn": 0.5, "knn_images": 1000}
        assert [kind for _, kind in called(some)[0]] == expected
    falls_back = rows(stuck)
    for index, knn in ((20, 0.56), (40, 0.5)):
        falls_back[index] |= {"eval_knn": knn, "start_knn": 0.5, "knn_images": 1000}
    assert [kind for _, kind in called(falls_back)[0]] == ["no_progress"]


def test_random_features_may_get_worse_until_the_run_learns_but_trained_ones_may_not():
    early = [row | {"dino_local_crops_loss": math.log(256)} for row in evaluated([0.41, 0.42, 0.41, 0.41], 0.52)]
    assert called(early)[0] == []
    assert called(early, trained_start=True)[0] == [(150, "worse_than_start")]


def test_rising_and_non_finite_numbers_explode_while_a_search_for_the_loss_scale_does_not():
    good = {"loss": [4.0] * 40, "teacher": [4.0] * 40, "prototype": [5.5] * 40, "rank": [12.0] * 40}
    fine = [row | {"grad_norm_backbone": 1.0, "skipped_steps": min(i, 40)} for i, row in enumerate(rows(good))]
    assert called(fine) == ([], [])
    for bad in (
        {"dino_local_crops_loss": 6.0},
        {"dino_local_crops_loss": 3.9, "grad_norm_backbone": 20.0},
        {"grad_norm_backbone": math.nan},
    ):
        assert called([*fine[:20], *(row | bad for row in fine[20:])]) == ([(290, "exploding")], ["exploding"]), bad
    assert called([row | {"skipped_steps": 3 * i} for i, row in enumerate(fine)])[0] == [(230, "exploding")]


def test_weights_that_grow_on_explode_although_rankme_recovers():
    good = {"loss": [5.5] * 40, "teacher": [4.0] * 40, "prototype": [5.5] * 40}
    for growth, lost, expected in ((0.02, 10, 190), (0.02, 2, 140), (0.0, 2, None), (0.0, 10, None), (0.02, 99, None)):
        rank = [7.0 if lost <= i < lost + 5 else 10.0 for i in range(40)]
        weights = [40.0 + min(i, 10) + 40 * growth * max(i - 10, 0) for i in range(40)]
        series = zip(rows(good | {"rank": rank}), weights, strict=True)
        found, _ = called([row | {"weight_norm_backbone": norm} for row, norm in series])
        assert [at for at, kind in found if kind == "exploding"] == [expected] * (expected is not None), (growth, lost)


def test_few_prototypes_need_a_tenth_of_the_run_if_dimensions_are_lost_else_more():
    steps = torch.arange(140)
    falls, lost = 1.5 - 0.01 * steps, 10.0 - 0.2 * steps.clamp(max=30)
    at = {}
    for name, entropy, rank, teacher in (
        ("falls", falls, lost, 0.25),
        ("keeps its dimensions", falls, torch.full((140,), 10.0), 0.25),
        ("recovers", 1.0 + 0.005 * steps, lost, 0.25),
        ("uncertain", falls, lost, 0.45),
    ):
        columns = {"loss": [4.0] * 140, "teacher": [teacher] * 140}
        columns |= {"prototype": entropy.tolist(), "rank": rank.tolist()}
        some = [row | {"current_batch_size": 32} for row in rows(columns, every=1)]
        alarm = alarm_for(256, 200)
        at[name] = next(row["iteration"] for row in some if "single_prototype" in alarm.check(row, 200))
    assert at == {"falls": 20, "keeps its dimensions": 120, "recovers": 120, "uncertain": 120}


@pytest.mark.parametrize("name", list(RECORDED))
def test_recorded_runs_get_the_right_verdict_before_a_quarter(name):
    """Rows of ``benchmarks/verdict.py --record``, of runs of 200 iterations."""
    expected, trained_start = EXPECTED[name]
    for columns in RECORDED[name]:
        values = zip(*columns.values(), strict=True)
        some = [{k: v for k, v in zip(columns, row, strict=True) if v is not None} for row in values]
        alarm = LearningAlarm(256, FLAT_LOSS, lambda iteration: 200, trained_start=trained_start)
        found = [(row["iteration"], kind) for row in some for kind in alarm.check(row, 200)]
        if expected:
            assert expected in [kind for iteration, kind in found if iteration <= 50]
        else:
            assert found == []


def test_one_prototype_for_all_and_lost_dimensions():
    healthy, bad = [4.0] * 5, [0.01] * 11
    series = {"loss": [4.0] * 16, "teacher": healthy + bad, "prototype": healthy + bad, "rank": [20.0] * 5 + [4.0] * 11}
    found, again = alarms(series, 256, 100_000)
    assert found == {140: ["single_prototype", "dimensional"]} and len(again) == 2
    assert "sinkhorn_knopp" in again[0] and "koleo" in again[1] and "4 dimensions (RankMe), they filled 20" in again[1]


def test_warnings_from_before_a_resume_are_repeated_only_at_the_end(caplog):
    alarm = alarm_for(256, 300)
    alarm.read(rows(BLOOD_CELLS)[:20])
    for row in rows(BLOOD_CELLS)[20:]:
        alarm.log(row["iteration"], row)
    assert caplog.records == [] and len(list(alarm.final_verdicts().values())) == 1
    alarm = alarm_for(256, 300)
    alarm.read(rows(BLOOD_CELLS)[:5])
    for row in rows(BLOOD_CELLS)[5:]:
        alarm.log(row["iteration"], row)
    assert len(caplog.records) == 1


def test_the_length_of_a_run_by_the_clock_is_that_of_its_newest_row():
    """When its earlier rows are read, the clock is at the newest row."""
    alarm = LearningAlarm(65536, math.log(65536), lambda iteration: iteration * 4)
    alarm.read(rows(long_run(0.1, 0.0), every=100)[:250])
    assert alarm.called == {} and alarm.has_learned


def test_rows_of_upstream_and_runs_without_a_dino_loss():
    alarm = LearningAlarm(256, None, lambda iteration: 100)
    assert alarm.check({"iteration": 0, "total_loss": 1.0}, 100) == []
    uniform = [{"iteration": 10 * i, "teacher_entropy": 5.545, "prototype_entropy": 5.545} for i in range(12)]
    assert [alarm.check(row, 100) for row in uniform].index(["uniform"]) == 9


def test_the_loss_of_an_even_spread_is_what_the_step_reports():
    """The factors of the reported terms depend on the number of local crops."""
    for local in (0, 2):
        cfg = tiny_config(f"crops.local_crops_number={local}")
        model = SSLMetaArch(cfg).train()
        for side in (model.student, model.teacher):
            side["dino_head"].last_layer.weight_g.data.zero_()  # all logits are 0
        losses = model.forward_backward(random_batch(cfg), teacher_temp=0.05)
        flat = sum(float(value) for name, value in losses.items() if name.startswith("dino_"))
        assert flat == pytest.approx(flat_dino_loss(model), rel=1e-3)


def test_rankme():
    generator = torch.Generator().manual_seed(0)
    alike = torch.ones(32, 16) + 1e-6 * torch.randn(32, 16, generator=generator)
    assert rankme(alike) == pytest.approx(1, abs=1e-3)
    assert rankme(torch.eye(16)) == pytest.approx(16, rel=1e-3)
    singular = torch.tensor([3.0, 1.0])
    shares = singular / singular.sum()
    expected = float(torch.exp(-(shares * shares.log()).sum()))
    assert rankme(torch.diag(singular) @ torch.linalg.qr(torch.randn(2, 2)).Q) == pytest.approx(expected, rel=1e-4)
    assert math.isnan(rankme(torch.full((4, 4), math.nan)))


def test_bad_images_are_logged_once_also_after_a_restart(tmp_path):
    path = tmp_path / "bad_images.jsonl"
    log = BadImageLog(path)
    log("a.png", "truncated")
    log("a.png", "truncated")
    with open(path, "a") as file:
        file.write('[]\n{"path": []}\n{"path": "torn')  # by other programs, and torn
    again = BadImageLog(path)
    again("a.png", "truncated")
    again("b.png", "empty")
    lines = path.read_text().splitlines()
    assert json.loads(lines[0]) == {"path": "a.png", "reason": "truncated"}
    assert json.loads(lines[-1]) == {"path": "b.png", "reason": "empty"}
    assert len(lines) == 5 and again.seen == {"a.png", "b.png"}
