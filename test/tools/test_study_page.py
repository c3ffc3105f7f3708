"""tools/study_page.py: tables and figures from records, and a page that is otherwise left alone."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from espnet_pl.recipe import measure

ROOT = Path(__file__).resolve().parents[2]
SPEC = importlib.util.spec_from_file_location("study_page", ROOT / "tools/study_page.py")
page = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(page)

TEXT = """# Soft

Written by hand.
<!-- table toy: against hard: * -->
old
<!-- end -->
<!-- figure toy: student_blank_share cer: hard soft -->
<!-- end -->
More by hand.
"""


def record(cell, seed, wrong, speakers=None):
    """Twenty utterances of five words; the first ``wrong`` of them have one substituted."""
    errors = {f"u{i}": [5, 0, 0, 0] if i >= wrong else [4, 1, 0, 0] for i in range(20)}
    return {
        "corpus": "toy", "cell": cell, "seed": seed, "errors": {"dev": errors},
        "speakers": {"dev": speakers}, "updates": 200, "wall_s": 60.0,
        "alarms": [120, 180] if wrong > 15 else [],
        "finished": f"2026-01-0{seed} 10:00:00",
        "environment": {"torch": "2", "commit": "abc" if seed < 3 else "def", "machine": "M"},
        "curves": {
            "train": {
                "student_blank_share": [[50, 0.5], [100, 0.6], [150, 0.8], [200, 1.0]],
                "student_frame_entropy": [[50, None], [200, 0.25]],
            },
            "valid": {"cer": [[100, 0.5], [200, 0.25 * seed]]},
        },
    }  # fmt: skip


def keep(folder, made):
    """Write a record where the page looks for it."""
    path = folder / f"data/soft/{made['corpus']}.{made['cell']}.{made['seed']}.json"
    path.write_text(json.dumps(made))


@pytest.fixture
def folder(tmp_path):
    data = tmp_path / "data/soft"
    data.mkdir(parents=True)
    for cell, seeds in (("hard", {1: 4, 2: 6, 3: 8}), ("soft", {1: 14, 2: 16, 3: 18})):
        for seed, wrong in seeds.items():
            keep(tmp_path, record(cell, seed, wrong))
    (tmp_path / "soft.md").write_text(TEXT)
    return tmp_path


def test_a_page_is_filled_and_left_alone_elsewhere(folder):
    page.fill("soft", folder)
    text = (folder / "soft.md").read_text()
    assert text.startswith("# Soft\n\nWritten by hand.\n<!-- table") and "old" not in text
    assert text.endswith("<!-- end -->\nMore by hand.\n")
    assert "|hard|**6.0** (4.0, 6.0, 8.0)||0.900|0.250|–|–, –, –|200|60|" in text
    line = next(line for line in text.splitlines() if line.startswith("|soft|"))
    assert "|**16.0** (14.0, 16.0, 18.0)|+10.0 [" in line and line.count("worse") == 1
    assert "|–, 120, 120|" in line
    assert "](soft_1.png)" in text
    assert (folder / "soft_1.png").read_bytes()[:4] == b"\x89PNG"
    page.fill("soft", folder)
    assert (folder / "soft.md").read_text() == text


def test_what_no_training_has_told_is_no_column(folder):
    for path in (folder / "data/soft").glob("*.json"):
        of_cell = json.loads(path.read_text())
        of_cell["curves"]["train"] = {}
        path.write_text(json.dumps(of_cell))
    page.fill("soft", folder)
    lines = (folder / "soft.md").read_text().splitlines()
    head, line = (next(x for x in lines if x.startswith(f"|{name}|")) for name in ("cell", "hard"))
    assert head == "|cell|dev WER % (seeds)|against hard|updates|s|"
    assert line == "|hard|**6.0** (4.0, 6.0, 8.0)||200|60|"


def test_intervals_are_those_of_the_tables_of_results(folder):
    cells = page.read("soft", folder)["toy"]
    mean, low, high, seeds = page.interval([cells["soft"]], [cells["hard"]], ["dev"])
    columns = [
        [row[1] for row in cells[cell][seed]["errors"]["dev"].values()]
        for cell in ("soft", "hard")
        for seed in (1, 2, 3)
    ]
    table = np.array([*columns, [5] * 20]).T.astype(float)
    sums = measure.resample(table, np.arange(20), measure.REPLICATES)
    expected = measure.interval(sums[:, :3], sums[:, 3:6], sums[:, 6])
    assert (mean, [low, high], seeds) == (pytest.approx(10.0), expected, 3)
    # Whole speakers are drawn where there are enough: here all errors are one speaker's.
    highest = []
    for speakers in (None, [0] * 4 + [*range(1, 17)]):
        for cell, wrong in (("hard", 0), ("soft", 4)):
            cells[cell] = {1: record(cell, 1, wrong, speakers)}
        highest.append(page.interval([cells["soft"]], [cells["hard"]], ["dev"])[2])
    assert highest[1] > highest[0]
    assert page.interval([{1: {}}], [{2: {}}], ["dev"]) is None


def test_other_speech_than_the_first_set_has_a_table_of_its_own(folder):
    for path in (folder / "data/soft").glob("*.json"):
        kept = json.loads(path.read_text())
        for name, wrong in (("a", 1), ("b", 2)):
            kept["errors"][name] = {"u": [4 - wrong, wrong, 0, 0]}
            kept["speakers"][name] = None
        path.write_text(json.dumps(kept))
    (folder / "soft.md").write_text(TEXT.replace("against hard:", "against hard on a,b:"))
    page.fill("soft", folder)
    text = (folder / "soft.md").read_text()
    assert "a+b WER %" in text and "|hard|**37.5** (37.5, 37.5, 37.5)||" in text
    assert "(37.5, 37.5, 37.5)|+0.0 [+0.0, +0.0]" in text


def test_a_ladder_of_teachers(folder):
    wrong_of = {"teacher-good": 2, "teacher-bad": 12, "good-hard": 4, "bad-hard": 14}
    for cell, wrong in {**wrong_of, "good-full": 3, "bad-full": 8}.items():
        for seed in (1, 2, 3):
            keep(folder, record(cell, seed, wrong + seed))
    (folder / "soft.md").write_text("<!-- ladder toy: on dev: hard full new -->\n<!-- end -->\n")
    page.fill("soft", folder)
    lines = (folder / "soft.md").read_text().splitlines()
    assert lines[1] == "|student|teacher-good: 4.0 %|teacher-bad: 14.0 %|last − first|"
    assert lines[3] == "|hard|**6.0** (5.0, 6.0, 7.0)|**16.0** (15.0, 16.0, 17.0)|**+10.0**|"
    good, bad, more = lines[4].split("|")[2:5]
    assert good.startswith("**5.0** (4.0, 5.0, 6.0) -1.0 [") and bad.endswith("better")
    assert more.startswith("**+5.0** -5.0 [") and more.endswith("better")
    assert lines[5] == "|new|–|–|–|"
    assert "](soft_1.png)" in lines[7] and (folder / "soft_1.png").stat().st_size > 1000


def test_a_ladder_of_the_difference_between_two_kinds_of_speech(folder):
    near = {"teacher-good": 2, "good-hard": 4, "good-full": 4}
    for cell, wrong in near.items():
        for seed in (1, 2, 3):
            of_seed = record(cell, seed, wrong)
            more = 6 if cell == "good-full" else 12
            of_seed["errors"]["far"] = record(cell, seed, wrong + more)["errors"]["dev"]
            of_seed["speakers"]["far"] = None
            keep(folder, of_seed)
    block = "<!-- ladder toy: on {}: hard full -->\n<!-- end -->\n"
    (folder / "soft.md").write_text(block.format("far less dev"))
    page.fill("soft", folder)
    lines = (folder / "soft.md").read_text().splitlines()
    assert lines[1] == "|student|teacher-good: 14.0 %|last − first|"
    assert lines[3] == "|hard|**12.0** (12.0, 12.0, 12.0)|**+0.0**|"
    assert lines[4].startswith("|full|**6.0** (6.0, 6.0, 6.0) -6.0 [") and "] better|" in lines[4]
    assert lines[5] == "<!-- end -->" and not list(folder.glob("soft_*.png"))
    # Each kind of speech is drawn by itself: nothing is certain where only one of them differs.
    cells = page.read("soft", folder)["toy"]
    sides = [cells["good-full"]], [cells["good-hard"]]
    assert page.interval(*sides, ["dev"])[1:3] == (0.0, 0.0)
    far, both = (page.interval(*sides, ["far"], less)[:3] for less in (None, ["dev"]))
    assert far == both and far[1] < -6 < far[2]
    mean, low, high, _ = page.interval(*sides, ["far"], ["far"])
    assert mean == 0 and low < 0 < high


def test_how_much_of_an_oracles_gain_is_recovered(folder):
    cells = {"base": (10, 10, 11), "best": (2, 3, 3), "lm": (6, 7, 7), "worse": (12, 13, 13)}
    for cell, counts in cells.items():
        for seed, wrong in enumerate(counts, 1):
            keep(folder, record(cell, seed, wrong))
    block = "<!-- recovery toy: from base to {} on dev: lm worse -->\n<!-- end -->\n"
    (folder / "soft.md").write_text(block.format("best"))
    page.fill("soft", folder)
    lines = (folder / "soft.md").read_text().splitlines()
    assert lines[1] == "|cell|dev WER % (seeds)|against base|recovered of best's gain %|"
    assert lines[3] == "|base|**10.3** (10.0, 10.0, 11.0)|||"
    assert lines[4].startswith("|best|**2.7** (2.0, 3.0, 3.0)|-7.7 [") and lines[4].endswith("||")
    share = lines[5].split("|")[4]
    assert share.startswith(f"{100 * (31 - 20) / (31 - 8):.1f} [") and share.endswith("better")
    assert lines[6].split("|")[4].startswith(f"{100 * (31 - 38) / (31 - 8):.1f} [")
    # Of a gain that may be none there is no share, and two seeds decide nothing.
    (folder / "soft.md").write_text(block.format("worse"))
    page.fill("soft", folder)
    assert "|lm|" in (text := (folder / "soft.md").read_text()) and "|–|" in text
    (folder / "data/soft/toy.lm.3.json").unlink()
    (folder / "soft.md").write_text(block.format("best"))
    page.fill("soft", folder)
    assert "] inconclusive|\n|worse|" in (folder / "soft.md").read_text()


def test_a_ladder_before_its_students(folder):
    keep(folder, record("teacher-good", 1, 3))
    (folder / "soft.md").write_text("<!-- ladder toy: on dev: new -->\n<!-- end -->\n")
    page.fill("soft", folder)
    assert "|new|–|–|" in (folder / "soft.md").read_text()


def test_of_which_seeds_a_difference_is(folder):
    keep(folder, record("once", 2, 9))
    (folder / "soft.md").write_text("<!-- table toy: against hard: once soft -->\n<!-- end -->\n")
    page.fill("soft", folder)
    once, soft = (folder / "soft.md").read_text().splitlines()[3:5]
    assert "+3.0 [" in once and "inconclusive (seed 2)|" in once
    assert "+10.0 [" in soft and "(seed" not in soft


def test_where_the_numbers_are_from(folder):
    (folder / "soft.md").write_text("<!-- origin -->\nold\n<!-- end -->\nMore.\n")
    page.fill("soft", folder)
    assert (folder / "soft.md").read_text() == (
        "<!-- origin -->\n6 trainings, 0.1 h in sum, 2026-01-01 to 2026-01-03:\n\n"
        "- torch 2, M; commits abc (4), def (2)\n<!-- end -->\nMore.\n"
    )


def test_a_pattern_that_nothing_fits_is_told(folder):
    (folder / "soft.md").write_text(TEXT.replace("hard: *", "hard: sfot*"))
    with pytest.raises(SystemExit, match="no record of toy fits 'sfot"):
        page.fill("soft", folder)


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ("table toy: against hrad: *", "no record of a cell 'hrad'"),
        ("recovery toy: from hard to bets on dev: *", "no record of a cell 'bets'"),
        ("table toy: against hard on tset: *", "no test set 'tset'"),
        ("recovery toy: from hard to hard: *", "no test set ''"),
    ],
)
def test_names_that_no_record_has_are_refused(folder, block, message):
    (folder / "soft.md").write_text(f"<!-- {block} -->\n<!-- end -->\n")
    with pytest.raises(SystemExit, match=message):
        page.fill("soft", folder)
