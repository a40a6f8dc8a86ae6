"""Data that are refused, by name: files and folders that do not hold what is asked for, and settings that cannot be."""

import pickle
from dataclasses import replace

import pytest

from fedsim.data import text
from fedsim.data.source import DataConfig, _loaded, cifar10, digits, load, pydoc, sst2
from tests.support.data_files import csv_file, picture


pytestmark = pytest.mark.usefixtures("read_again")


def test_tokens_outside_the_promised_vocabulary_are_refused(tmp_path, monkeypatch):
    name = csv_file(tmp_path, "data.csv", ["text,label", "a,0", "b,1"])
    monkeypatch.setattr(text, "vocabulary", lambda tokenizer, hub: 100)
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='bytes'.* size, 100; it gave 257"):
        load(DataConfig(name=name, text=("text",), num_classes=2), None)


@pytest.mark.parametrize("column", ["text", "sentence"])
def test_text_taken_for_images_is_refused_with_the_remedy(tmp_path, column):
    name = csv_file(tmp_path, "train.csv", [f"{column},label", "a,0", "b,1"])
    config = DataConfig(name=name, num_classes=2)
    with pytest.raises(ValueError, match=rf"task\.data\.text=\(\): must be .*--set task\.data\.text={column} "):
        load(config, None)
    assert load(replace(config, text=(column,)), None).kind == "text"


def test_images_taken_for_text_are_refused(tmp_path):
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"img": datasets.Image(), "label": datasets.Value("int64")})
    rows = {"img": [picture(0), picture(9)], "label": [0, 1]}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(str(tmp_path / "train.parquet"))
    config = DataConfig(name=str(tmp_path), text=("img",), num_classes=2)
    with pytest.raises(ValueError, match=r"task\.data\.text='img': must be a column of texts; it holds Image"):
        load(config, None)
    with pytest.raises(ValueError, match=r"task\.data\.text=\(\): must be the text columns.*\['img', 'label'\]"):
        load(replace(config, text=(), objective="next_token"), None)
    assert load(replace(config, text=()), None).kind == "image"


@pytest.mark.parametrize(
    ("lines", "settings", "words"),
    [
        (["text,label", "a,0", "b,2"], {}, r"task\.data\.num_classes=2: label 2 less task\.data\.label_offset=0 is 2"),
        (["text,label", "a,1", "b,0"], {"label_offset": 1}, "label 0 less .*label_offset=1 is -1"),
        (["text,label", "a,0", "b,pos"], {}, r"task\.data\.label='label'.*data\.csv, row 1 holds 'pos'"),
        (["text,label", "a,0", "b,1.5"], {}, "whole numbers.*data.csv, row 1 holds '1.5'"),
        (["text,label", "a,0", "b,"], {}, "a label in every row; .*data.csv, row 1 holds ''"),
        (["text,label", "a,0", "b,1"], {"text": ("body",)}, r"task\.data\.text='body'.*\['text', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"text": (2,)}, r"task\.data\.text=2.*\['text', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"label": "class"}, r"task\.data\.label='class'.*\['text', 'label'\]"),
        (
            ["text,label", "a,0", "b,1"],
            {"image": "text", "text": ()},
            r"task\.data\.image='text': must be a column of images; .*data\.csv, row \d: cells of type str",
        ),
        (["text,kind", "a,0", "b,1"], {}, r"task\.data\.label=None.*\['text', 'kind'\]"),
        (["body,label", "a,0", "b,1"], {"text": ()}, r"task\.data\.text=\(\).*text=COLUMN.*\['body', 'label'\]"),
        (["text,label", "a,0", "b,1"], {"group": "by"}, r"task\.data\.group='by': no such column.*\['text', 'label'\]"),
        (["text,label", "a,0"], {}, "it holds 1"),
        (["text,label"], {}, r"examples; .*data\.csv holds none but its header line"),
        (["text,label", "a,0,", "b,1,"], {}, r"rows with 2 cells; .*row 0 has 3; a comma at its end begins one more"),
        (["text;label", "a;0"], {}, r"no such column.*\['text;label'\].*; its cells seem to be separated by ';'"),
        (["text;label", "a, b;0"], {}, r"rows with 1 cells; .*row 0 has 2; its cells seem to be separated by ';'"),
        (
            ["text,label", "a,1.0", "b,0.0"],
            {},
            r"row 0 holds '1\.0': write whole numbers, such as 0 for 0\.0 .*class_names",
        ),
        (
            ["text,label", "a,0", r'"said \"hi\" ok",1'],
            {},
            r"data\.csv, row 1 \(line 3\): .*; a quotation mark .* twice",
        ),
        (["text,label", "a,0", '"open,1'], {}, r"data\.csv, row 1 \(line 3\): unexpected end of data"),
        (["text,label", "a,0", "b,1,3"], {}, r"rows with 2 cells; .*data\.csv, row 1 has 3"),
        (["text,label", "a,0,9", "b,1,3"], {}, r"rows with 2 cells; .*data\.csv, row 0 has 3"),
        (["label,text", "0,a", "1"], {}, r"rows with 2 cells; .*data\.csv, row 1 has 1"),
        ([""], {}, r"could not be read as csv \(it is empty\)"),
    ],
)
def test_wrong_files_are_refused_by_name(tmp_path, lines, settings, words):
    name = csv_file(tmp_path, "data.csv", lines)
    with pytest.raises(ValueError, match=words):
        load(DataConfig(**{"name": name, "num_classes": 2, "text": ("text",), **settings}), None)


def test_wrong_folders_are_refused_by_name(tmp_path):
    csv_file(tmp_path, "train.csv", ["text,label", "a,0", "b,1"])
    config = DataConfig(name=str(tmp_path), text=("text",), num_classes=2)
    assert len(load(config, None).test) == 1
    with pytest.raises(ValueError, match=r"task\.data\.test_split='dev': must be a split of .*\['train\.csv'\]"):
        load(replace(config, test_split="dev"), None)
    with pytest.raises(ValueError, match=r"task\.data\.train_split='big'"):
        load(replace(config, train_split="big"), None)
    csv_file(tmp_path, "train.tsv", ["text\tlabel", "a\t0"])
    _loaded.cache_clear()
    with pytest.raises(ValueError, match=r"\['train\.csv', 'train\.tsv'\]"):
        load(config, None)
    (tmp_path / "train.tsv").rename(tmp_path / "test.tsv")
    with pytest.raises(ValueError, match=r"in one format, not \['csv', 'tsv'\]"):
        load(config, None)
    (tmp_path / "notes.txt").write_text("text")
    with pytest.raises(ValueError, match=r"ends in one of \.parquet, \.csv, \.tsv; fedsim\.data\.from_frame takes"):
        load(replace(config, name=str(tmp_path / "notes.txt")), None)
    (tmp_path / "bad.parquet").write_text("not parquet")
    with pytest.raises(ValueError, match="could not be read as parquet"):
        load(replace(config, name=str(tmp_path / "bad.parquet")), None)


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
@pytest.mark.parametrize("rows", [1, 5000])
def test_tables_that_are_not_utf_8(tmp_path, encoding, rows):
    file = tmp_path / "data.csv"
    file.write_text("text,label\n" + "a,0\n" * rows + "é,1\n", encoding)
    with pytest.raises(ValueError, match=r"data\.csv could not be read as csv \(it is not UTF-8: save it as UTF-8; "):
        load(DataConfig(str(file), text=("text",), num_classes=2), None)


def test_only_known_names_are_looked_up_in_the_data_folder(tmp_path):
    (tmp_path / "fashion").mkdir()
    with pytest.raises(
        ValueError, match=rf"{tmp_path}/fashion is there, but only these names are looked up in FEDSIM_D"
    ):
        load(DataConfig("fashion"), str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", None),
        ("hub", 1),
        ("config_name", 3),
        ("train_split", ""),
        ("test_split", "train"),
        ("test_share", 0),
        ("test_share", 1.0),
        ("test_share", float("nan")),
        ("test_share", "0.2"),
        ("test_share", True),
        ("image", True),
        ("image", -1),
        ("image", 0.0),
        ("text", "sentence"),
        ("text", ["sentence"]),
        ("text", (1.5,)),
        ("text", (None,)),
        ("text", (-1,)),
        ("text", ("",)),
        ("group", -1),
        ("group", 1.0),
        ("group", ""),
        ("objective", "words"),
        ("objective", None),
        ("config_name", ""),
        ("max_length", float("nan")),
        ("label", True),
        ("label", -2),
        ("label_offset", 0.5),
        ("header", "no"),
        ("limit", 0),
        ("limit", 2.0),
        ("limit", True),
        ("skip", -1),
        ("skip", 1.0),
        ("skip", None),
        ("image_size", 0),
        ("channels", 2),
        ("num_classes", 0),
        ("num_classes", None),
        ("class_names", "O"),
        ("class_names", ("O",)),
        ("class_names", (*"ABCDEFGHI", "")),
        ("class_names", (*"ABCDEFGHII",)),
        ("tokenizer", ""),
        ("tokenizer", None),
        ("max_length", 1),
    ],
)
def test_wrong_settings_are_refused_by_name(field, value):
    with pytest.raises(ValueError) as caught:
        DataConfig(**{"name": "some.csv", field: value})
    assert str(caught.value).startswith(f"task.data.{field}={value!r}: must be ")


def test_settings_that_do_not_fit_together_are_refused():
    with pytest.raises(ValueError, match=r"task\.data\.text=\('a',\)"):
        DataConfig(name="some.csv", image="img", text=("a",))
    with pytest.raises(ValueError, match=r"task\.data\.name='digits'"):
        digits(label="label")
    with pytest.raises(ValueError, match=r"task\.data\.name='pydoc'.*group"):
        pydoc(group="topic")
    for config in (digits(), cifar10(), DataConfig(name="a.csv", image="img")):
        with pytest.raises(ValueError, match=r"task\.data\.objective='next_token': must be 'classes' for images"):
            replace(config, objective="next_token")
        for objective in ("masked_token", "token_classes"):
            with pytest.raises(ValueError, match=rf"objective='{objective}': must be 'classes' for images"):
                replace(config, objective=objective)
    with pytest.raises(ValueError, match=r"objective='token_classes': must be 'next_token' or 'masked_token' for"):
        pydoc(objective="token_classes")
    with pytest.raises(ValueError, match=r"task\.data\.text=\('a', 'b'\): must be one column"):
        DataConfig(name="some.parquet", objective="token_classes", text=("a", "b"))
    with pytest.raises(
        ValueError, match=r"class_names=\('O', 'B-X'\): must be empty or .*num_classes=3 names; there are 2"
    ):
        DataConfig(name="some.parquet", objective="token_classes", num_classes=3, class_names=("O", "B-X"))
    with pytest.raises(ValueError, match=r"task\.data\.tokenizer='words'"):
        pydoc(tokenizer="words")
    with pytest.raises(ValueError, match=r"task\.data\.num_classes=5"):
        load(digits(num_classes=5), None)


def test_settings_travel():
    config = sst2(limit=3)
    assert pickle.loads(pickle.dumps(config)) == config and hash(config) == hash(sst2(limit=3))


def test_a_mean_of_pixels_without_a_deviation_is_refused_by_both_names():
    with pytest.raises(ValueError, match=r"task\.data\.image_std=\(\): .*together with task\.data\.image_mean"):
        digits(image_mean=(0.0,))
    with pytest.raises(ValueError, match=r"task\.data\.image_mean=\(\): .*together with task\.data\.image_std"):
        digits(image_std=(1.0,))
