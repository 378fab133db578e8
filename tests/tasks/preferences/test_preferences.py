"""Preference sets: what is read, what is refused or dropped, what is made of a task, and the batches of it."""

import json
import sys

import numpy as np
import pytest

from jaxpo.fields import ROLES
from jaxpo.tasks import build as build_task
from jaxpo.tasks.preferences.encode import as_kind, encode, units
from jaxpo.tasks.preferences.records import row_of
from jaxpo.tasks.preferences.sets import build, datasets, jsonl
from jaxpo.text.conversations import Turn
from jaxpo.text.tokenizers import CharTokenizer

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz {}:DB")
PAIR_ROW = {"prompt": "up", "chosen": "down", "rejected": "up"}


def write(path, rows):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows))
    return path


def chat(*turns):
    return [{"role": role, "content": text} for role, text in turns]


# ---- reading


def test_pairs_with_soft_preferences_and_numbers(tmp_path):
    rows = [
        {**PAIR_ROW, "pref_prob": 0.8, "win": {"chosen": 0.7, "rejected": 0.4}},
        {**PAIR_ROW, "prompt": "x", "pref_prob": 1, "win_chosen": 0.5, "win_rejected": 0.25, "rationale": "why"},
    ]
    data = jsonl(write(tmp_path / "p.jsonl", rows))
    assert (data.kind, data.test, data.report) == (
        "pair", [], {"data/size": 2.0, "data/held_out": 0.0, "data/dropped": 0.0}
    )  # fmt: skip
    first, second = data.train
    assert [(a.role, a.text, dict(a.numbers)) for a in first.answers] == [
        ("chosen", "down", {"pref_prob": 0.8, "win": 0.7}),
        ("rejected", "up", {"pref_prob": 0.8, "win": 0.4}),
    ]
    assert [a.role for a in second.answers] == ["chosen", "rejected", "rationale"]
    assert second.answers[1].numbers == {"pref_prob": 1.0, "win": 0.25}


def test_labels_and_scored_lists(tmp_path):
    labels = jsonl(write(tmp_path / "l", [{"prompt": "a", "completion": "b", "label": True}]))
    assert labels.kind == "label" and labels.train[0].answers[0].numbers == {"label": 1.0}
    scored = jsonl(write(tmp_path / "s", [{"prompt": "a", "completions": ["b", "c"], "scores": [0.5, -2]}]))
    assert scored.kind == "scored" and [a.numbers["reward"] for a in scored.train[0].answers] == [0.5, -2.0]


def test_messages_with_and_without_a_prompt():
    asked = chat(("user", "hi"))
    explicit = row_of({"prompt": asked, "chosen": chat(("assistant", "yes")), "rejected": "no"}, {})
    whole = row_of({r: chat(("user", "hi"), ("assistant", t)) for r, t in (("chosen", "yes"), ("rejected", "no"))}, {})
    assert explicit == whole and explicit.prompt == tuple(asked)
    encoded, _ = encode([explicit], TOKENIZER)  # one message of the user is a question, for any tokenizer
    assert TOKENIZER.decode(encoded[0][0].prompt) == "hi\n"
    with pytest.raises(ValueError, match="chat template"):
        encode([explicit._replace(prompt=tuple(chat(("system", "be"), ("user", "hi"))))], TOKENIZER)


def test_fields_of_other_names(tmp_path):
    path = write(tmp_path / "p", [{"question": "up", "good": "down", "rejected": "no"}])
    data = jsonl(path, fields={"prompt": "question", "chosen": "good"})
    assert data.train[0].prompt == "up" and data.train[0].answers[0].text == "down"


BAD_ROWS = {
    "equal_answers": {**PAIR_ROW, "rejected": "down"},
    "empty_answer": {**PAIR_ROW, "rejected": " "},
    "empty_prompt": {**PAIR_ROW, "prompt": ""},
    "missing_field": {"prompt": "up", "chosen": "down"},
    "out_of_range": {**PAIR_ROW, "pref_prob": 1.5},
    "wrong_type": {**PAIR_ROW, "chosen": 7},
    "another_kind": {"prompt": "a", "completion": "b", "label": 1},
    "not_json": "{",
}


@pytest.mark.parametrize("reason", BAD_ROWS)
def test_bad_rows_are_errors_with_file_and_line_or_dropped_and_counted(tmp_path, reason):
    path = write(tmp_path / "p.jsonl", [PAIR_ROW, BAD_ROWS[reason]])
    with pytest.raises(ValueError, match=r"p\.jsonl:2: .*bad='drop'"):
        jsonl(path)
    report = jsonl(path, bad="drop").report
    assert report["data/dropped"] == report[f"data/dropped/{reason}"] == 1 and report["data/size"] == 1


@pytest.mark.parametrize("label", [-0.1, 1.1, float("nan"), "yes", None])
def test_bad_labels(tmp_path, label):
    with pytest.raises(ValueError, match="label"):
        jsonl(write(tmp_path / "l", [{"prompt": "a", "completion": "b", "label": label}]))


def test_messages_that_name_the_remedy(tmp_path):
    path = write(tmp_path / "p", [{"promt": "up", "chosen": "a", "rejected": "b"}])
    with pytest.raises(ValueError, match="did you mean 'promt'"):
        jsonl(path)
    with pytest.raises(ValueError, match="no rows to train on .*1 dropped"):
        jsonl(path, bad="drop")
    with pytest.raises(ValueError, match="did you mean 'drop'"):
        jsonl(path, bad="dropp")
    with pytest.raises(ValueError, match="did you mean 'jsonl'"):
        build({"name": "jsnl", "path": path}, None)
    with pytest.raises(ValueError, match="did you mean 'path'"):
        build({"name": "jsonl", "pth": path}, None)


def test_held_out_prompts_are_never_trained_on(tmp_path):
    rows = [{**PAIR_ROW, "prompt": p, "rejected": r} for p in "abcdef" for r in ("x", "y")]
    data = jsonl(write(tmp_path / "p", rows), test_size=2, seed=3)
    assert len(data.train) == 8 and len(data.test) == 4
    assert not {r.prompt for r in data.train} & {r.prompt for r in data.test}
    with pytest.raises(ValueError, match="seed=3 has no effect without test_size"):
        jsonl(write(tmp_path / "p", rows), seed=3)
    two = jsonl(write(tmp_path / "p", rows), test_path=write(tmp_path / "t", rows[:2]))
    assert len(two.train) == 10 and len(two.test) == 2
    with pytest.raises(ValueError, match="6 different prompts"):
        jsonl(tmp_path / "p", test_size=6)


def test_datasets_on_disk(tmp_path, monkeypatch):
    class Part(list):
        """What is asked of a Dataset: to be iterated over."""

    folder = tmp_path / "d"
    folder.mkdir()
    library = type(sys)("datasets")
    library.load_from_disk = lambda path: {"train": Part([PAIR_ROW]), "test": Part([{**PAIR_ROW, "prompt": "t"}])}
    monkeypatch.setitem(sys.modules, "datasets", library)
    data = datasets(folder, test_split="test")
    assert len(data.train) == len(data.test) == 1 and data.train[0].where.endswith("d[train]:1")
    with pytest.raises(ValueError, match="did you mean 'test'"):
        datasets(folder, test_split="tst")
    library.load_from_disk = lambda path: Part([PAIR_ROW])
    assert len(datasets(folder).train) == 1
    with pytest.raises(ValueError, match="no splits"):
        datasets(folder, split="train")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'jaxpo\[datasets\]'"):
        datasets(folder)
    with pytest.raises(FileNotFoundError):
        datasets(tmp_path / "absent")


# ---- from a task


def toy(**options):
    return build_task(dict(name="toy", train_size=60, test_size=20, seed=1, digits=3, base=4, **options))


def test_right_against_wrong_with_an_exact_share_of_flips():
    task = toy()
    clean, noisy = (build({"name": "task", "flipped": f, "seed": 5}, task) for f in (0.0, 0.4))
    right = {e.question: e.answer for e in (*task.train, *task.test)}
    assert all(r.answer("chosen").text == right[r.prompt] != r.answer("rejected").text for r in clean.train)
    swapped = [
        a.answer("chosen").text == b.answer("rejected").text for a, b in zip(clean.train, noisy.train, strict=True)
    ]
    assert sum(swapped) == round(0.4 * len(swapped)) and noisy.report["data/flipped"] == sum(swapped) / len(swapped)
    assert noisy.test == clean.test and len(clean.test) == 20
    assert build({"name": "task", "flipped": 0.4, "seed": 5}, task) == noisy
    assert build({"name": "task", "flipped": 0.4, "seed": 6}, task).train != noisy.train
    assert len(build({"name": "task", "size": 7, "test_size": 3}, task).train) == 7
    with pytest.raises(ValueError, match=r"flipped must be a number in \[0, 1\], not 1.2"):
        build({"name": "task", "flipped": 1.2}, task)
    with pytest.raises(ValueError, match="config.task.name names no task"):
        build({"name": "task"}, None)


# ---- kinds, tokens, units


def pairs(n=3):
    return [row_of({"prompt": "ab"[: 1 + i % 2], "chosen": "c" * (i + 1), "rejected": "d", "win": {"chosen": 0.9, "rejected": 0.3}}, {}) for i in range(n)]  # fmt: skip  # noqa: E501


def test_kinds():
    labels = as_kind(pairs(2), "pair", "label")
    assert [(r.answers[0].text, r.answers[0].numbers["label"]) for r in labels] == [
        ("c", 1),
        ("d", 0),
        ("cc", 1),
        ("d", 0),
    ]
    scored = as_kind(pairs(1), "pair", "scored")
    assert [(a.text, a.numbers["reward"]) for a in scored[0].answers] == [("c", 1), ("d", 0)]
    row = row_of({"prompt": "a", "completions": ["x", "y", "z"], "scores": [1, 3, -1]}, {})
    pair = as_kind([row], "scored", "pair")[0]
    assert [(a.role, a.text, a.numbers["rm"], a.numbers["margin"]) for a in pair.answers] == [
        ("chosen", "y", 3, 4), ("rejected", "z", -1, 4)
    ]  # fmt: skip
    with pytest.raises(ValueError, match="all scores are 1"):
        as_kind([row_of({"prompt": "a", "completions": ["x", "y"], "scores": [1, 1]}, {})], "scored", "pair")
    with pytest.raises(ValueError, match="labelled answers"):
        as_kind(labels, "label", "pair")


def test_units_of_pairs():
    encoded, report = encode(pairs(), TOKENIZER, numbers=("win",))
    batch = units(encoded, ("chosen", "rejected"), ("win",), prompt_width=4, width=5)
    assert report == {"data/dropped": 0.0} and batch.tokens.shape == (6, 9) and batch.layout == ("chosen", "rejected")
    assert batch.mask.sum(1).tolist() == [2, 2, 3, 2, 4, 2]  # with the end of the sequence
    assert batch.per_row["win"].tolist() == pytest.approx([0.9, 0.3] * 3) and batch.shared_prompt == 2
    assert [ROLES[r] for r in batch.role] == ["chosen", "rejected"] * 3 and batch.group.tolist() == [0, 0, 1, 1, 2, 2]
    assert TOKENIZER.decode(batch.tokens[2]) == "ab\ncc" and len(set(batch.seed.tolist())) == 6


def test_units_of_labels_with_mismatched_answers():
    encoded, _ = encode(as_kind(pairs(2), "pair", "label"), TOKENIZER)
    batch = units(encoded, numbers=("label",), mismatched=True)
    texts = [TOKENIZER.decode(t) for t in batch.tokens]
    assert texts == ["a\nc", "a\nd", "a\nd", "a\nc", "ab\ncc", "ab\nd", "ab\nd", "ab\ncc"]
    assert [ROLES[r] for r in batch.role] == ["own", "kl"] * 4 and batch.shared_prompt == 2
    assert batch.per_row["label"].tolist() == [1, 0, 0, 0, 1, 0, 0, 0]
    with pytest.raises(ValueError, match="at least two entries"):
        units(encoded[:1], mismatched=True)


def test_units_of_ragged_scored_answers_are_filled_with_rows_that_do_not_count():
    rows = [row_of({"prompt": "a", "completions": list("xyz")[:k], "scores": [1, 2, 3][:k]}, {}) for k in (2, 3)]
    batch = units(encode(rows, TOKENIZER)[0], numbers=("reward",))
    assert batch.count.tolist() == [1, 1, 0, 1, 1, 1] and batch.reward.tolist() == [1, 2, 0, 1, 2, 3]
    assert batch.mask[2].sum() == 0 and batch.per_row == {}


def test_revisions_hold_a_draft_in_the_prompt():
    layout = ("chosen", "rejected", "chosen_given_rejected")
    encoded, _ = encode(pairs(1), TOKENIZER, roles=layout, templates={"draft_prompt": "{prompt} {draft}"})
    batch = units(encoded, layout)
    assert [TOKENIZER.decode(t) for t in batch.tokens] == ["a\nc", "a\nd", "a d\nc"] and batch.shared_prompt == 1


LONG = {
    "prompt_too_long": dict(prompt_width=2),
    "answer_too_long": dict(width=3),
    "missing_field": dict(numbers=("rm",)),
}


@pytest.mark.parametrize("reason", LONG)
def test_rows_that_do_not_fit_are_errors_or_dropped(reason):
    with pytest.raises(ValueError, match="the limit .* is|has no 'rm'"):
        encode(pairs(), TOKENIZER, **LONG[reason])
    encoded, report = encode(pairs(), TOKENIZER, bad="drop", **LONG[reason])
    assert report[f"data/dropped/{reason}"] == 3 - len(encoded) > 0


def test_answers_that_are_equal_as_tokens_and_foreign_characters():
    rows = [row_of({"prompt": "a", "chosen": "é", "rejected": "b"}, {})]
    with pytest.raises(ValueError, match="not in the alphabet"):
        encode(rows, TOKENIZER)
    assert encode(rows, TOKENIZER, bad="drop")[1]["data/dropped/not_encodable"] == 1
    with pytest.raises(ValueError, match="missing|no answer 'rationale'"):
        encode(pairs(1), TOKENIZER, roles=("chosen", "rationale"))
    assert np.isfinite(units(encode(pairs(), TOKENIZER)[0], ("chosen", "rejected")).mask).all()


# ---- an expert's edits, lists of numbers, prompts that hold answers

EDIT = {
    **{"prompt": "where", "truth": "in rome", "revised": "it is in rome", "original": "it is in oslo"},
    **{"corrupted_prompt": "whe", "severity": {"revised": [["rome", 2.5]], "original": [["is", 1.5], ["oslo", 2]]}},
    "relevance_revised": [["it", 3]],
}
EDITED = ("truth", "revised", "original", "truth_corrupted", "revised_corrupted")


def test_edits_are_five_answers_whose_tokens_weigh_what_their_spans_do(tmp_path):
    data = jsonl(write(tmp_path / "e", [EDIT]))
    assert data.kind == "edited" and [a.role for a in data.train[0].answers] == list(EDITED)
    encoded, _ = encode(data.train, TOKENIZER, roles=EDITED, weights=("severity", "relevance"))
    batch = units(encoded, EDITED, weights=("severity", "relevance"), width=16)
    texts = [TOKENIZER.decode(t) for t in batch.tokens]
    assert texts[3] == "whe\nin rome" and batch.shared_prompt == 1
    severity, relevance = batch.per_token["severity"], batch.per_token["relevance"]
    assert severity[0].tolist() == [1] * 8 + [0] * 8  # the truth, its end, and nothing
    assert severity[1].tolist() == severity[4].tolist() == [1] * 9 + [2.5] * 4 + [1] + [0] * 2
    assert severity[2].tolist() == [1] * 3 + [1.5] * 2 + [1] * 4 + [2] * 4 + [1] + [0] * 2
    assert relevance[1].tolist() == [3] * 2 + [1] * 12 + [0] * 2
    pair = as_kind(data.train, "edited", "pair")[0]
    assert [(a.role, a.text) for a in pair.answers] == [("chosen", "in rome"), ("rejected", "it is in oslo")]
    with pytest.raises(ValueError, match="needs the fields truth, revised, original, corrupted_prompt"):
        as_kind([pair], "pair", "edited")


class Words:
    """A tokenizer whose tokens are words with the space before them, the first one too."""

    vocab_size, pad_id, eos_ids = 9, 0, (0,)
    words = ("", " é", " in", " ro", "me", " it", " is", " q", " x")

    def encode(self, text):
        out, left = [], " " + text
        while left:
            token = max((w for w in self.words if w and left.startswith(w)), key=len)
            out, left = [*out, self.words.index(token)], left[len(token) :]
        return out

    def token_bytes(self):
        return [w.encode() for w in self.words]

    def turn(self, question, answer):
        return Turn(self.encode("q"), [*self.encode(answer), 0], answer)


def test_a_token_that_shares_a_byte_with_a_span_has_its_weight():
    record = EDIT | {"revised": "é in rome", "relevance_revised": [["é", 3], ["n r", 2], ["m", 4]]}
    record |= {"truth": "it is", "original": "it x", "severity": {}}
    rows = [row_of(record, {})]
    encoded, _ = encode(rows, Words(), roles=EDITED, weights=("relevance",))
    assert encoded[0][1].weights["relevance"].tolist() == [3, 2, 2, 4, 1]


BAD_EDITS = {
    "no_such_span": {"severity": {"revised": [["rome", 2], ["it", 2]]}},  # not in this order
    "wrong_type": {"severity": {"revized": []}},
    "out_of_range": {"severity_revised": [["it", -1]], "severity": {}},
    "missing_field": {"corrupted_prompt": None},
    "equal_answers": {"truth": EDIT["original"]},
}


@pytest.mark.parametrize("reason", BAD_EDITS)
def test_bad_edits(tmp_path, reason):
    path = write(tmp_path / "e.jsonl", [EDIT, EDIT | BAD_EDITS[reason]])
    with pytest.raises(ValueError, match=r"e\.jsonl:2: .*bad='drop'"):
        jsonl(path)
    assert jsonl(path, bad="drop").report[f"data/dropped/{reason}"] == 1


def test_lists_of_numbers_are_the_preferred_answers(tmp_path):
    data = jsonl(write(tmp_path / "p", [PAIR_ROW | {"rm_scores": [1, -0.5]}]))
    options = dict(roles=("chosen",), numbers=("rm_scores",))
    encoded, _ = encode(data.train, TOKENIZER, sizes={"rm_scores": 2}, **options)
    assert units(encoded, ("chosen",), ("rm_scores",)).per_row["rm_scores"].tolist() == [[1, -0.5]]
    with pytest.raises(ValueError, match=r"p:1: the chosen answer has 2 rm_scores, but config.heads.gate"):
        encode(data.train, TOKENIZER, sizes={"rm_scores": 3}, **options)
    with pytest.raises(ValueError, match="'rm_scores' must be a list of numbers"):
        jsonl(write(tmp_path / "q", [PAIR_ROW | {"rm_scores": 2}]))


def test_prompts_that_hold_answers(tmp_path):
    rows = [PAIR_ROW | {"rationale": "b"}, PAIR_ROW | {"rationale": {"prompt": "", "completion": "c"}}]
    data = jsonl(write(tmp_path / "p", rows), rationale_prompt="{rejected} {prompt} {chosen} {other}")
    encoded, _ = encode(data.train, TOKENIZER, roles=("rationale",), templates=data.templates)
    assert [TOKENIZER.decode(t.prompt) for (t,) in encoded] == ["up up down {other}\n", "\n"]
    with pytest.raises(ValueError, match=r"draft_prompt 'better' does not say where \{draft\} goes"):
        jsonl(tmp_path / "p", draft_prompt="better")
