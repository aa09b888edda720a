"""Names from elsewhere in the model card: they stay text, whatever is in them."""

import ast
import re

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from test_card import REPO, complaints, parts

from diffusers_cl.card import MAX_NAMED_CLASSES, model_card
from diffusers_cl.markup import code_span, plain, python_literal


HOSTILE = [
    *["", " ", "  two ", "`", "``", "`<b>`", "``<b>", "a`", "\\", "\\`", "|", "a|b\\|", "# heading", "> quote"],
    *["<script>alert(1)</script>", "</details><h1>x</h1>", "a\n\n# heading\n\n---\nx: y\n", "\r\n---\r\n", "---"],
    *["[x](http://x.org)", "![x](http://x.org/x.png)", "<http://x.org>", "$$x$$", "&lt;b&gt;", "*x* __y__ ~~z~~"],
    *["'", '"', "it's", "\"'\\", "\u2028# x", "\u202eabc", "\x00", "\udc80", "{{x}}", "\u00e9\u732b", "```\n# x\n```"],
]


@pytest.mark.parametrize("name", HOSTILE)
def test_any_name_stays_text(name):
    tokens = MarkdownIt("commonmark").parse(f"- {', '.join([code_span(other) for other in (name, 'x', name)])}")
    (inline,) = [token for token in tokens if token.type == "inline"]
    shown = name if name.strip() and name.isprintable() else repr(name)
    assert [token.type for token in inline.children] == ["code_inline", "text"] * 2 + ["code_inline"]
    assert [token.content for token in inline.children[::2]] == [shown, "x", shown]
    literal = python_literal(name)
    assert ast.literal_eval(literal) == name and "\n" not in literal
    assert re.fullmatch(r"[\w .,()+/-]*", plain(name)) and len(plain(name)) == len(name)


def test_names_cannot_break_the_card(tmp_path):
    bad = "x\n---\n# injected\n<script>y</script> `|` [x](http://x.org)"
    pipeline, state, metrics, config = parts(tmp_path, tasks=[HOSTILE[:9], HOSTILE[9:20], HOSTILE[20:]])
    expected = ModelCard(model_card(*parts(tmp_path / "tame"), REPO))
    state |= {"dataset": bad, "lineage": {"previous": {"model": bad, "revision": bad}}}
    metrics["feature_extractor"] = bad
    metrics["config"] |= {"eval_split": bad, "dataset_name": bad}
    for key in ("metrics", "floor"):
        metrics[key] = {f"{name}{bad}": values for name, values in metrics[key].items()}
    for key in ("license", "dataset_name", "dataset_config_name", "eval_split"):
        setattr(config, key, bad)
    card = model_card(pipeline, state, metrics, config, REPO)

    loaded = ModelCard(card.encode("utf-8").decode())
    assert str(loaded) == card and not complaints(loaded.data.to_dict())
    assert loaded.data.to_dict().keys() == expected.data.to_dict().keys()
    markdown = MarkdownIt("commonmark").enable("table")
    tokens, tame = markdown.parse(loaded.text), markdown.parse(expected.text)

    def structure(tokens) -> list[str]:
        return [token.type for token in tokens if token.type != "inline"]

    assert structure(tokens) == structure(tame)
    children = [child for token in tokens for child in token.children or []]
    assert not {"html_inline", "link_open"} & {child.type for child in children}
    assert [child.attrs["src"] for child in children if child.type == "image"] == ["samples.png"]
    shown = [child.content for child in children if child.type == "code_inline"]
    assert all(name in shown for name in HOSTILE if name.strip() and name.isprintable())
    for token in tokens:
        if token.type == "fence" and token.info == "python":
            ast.parse(token.content)


def test_names_at_most_so_many_classes(tmp_path):
    tasks = [[f"class {10 * task + i}" for i in range(10)] for task in range(7)]
    tasks[4] = tasks[4][:5]
    matrix = [[1.0] * (task + 1) for task in range(7)]
    distance = {"matrix": matrix, "average": [1.0] * 7, "learning": 1.0, "forgetting": 0.0, "worst": 1.0}
    card = model_card(*parts(tmp_path, distance, tasks), REPO)
    assert "`class 44` (44)\n- task-05: `class 50` (45), " in card
    assert "`class 54` (49), 5 more\n- task-06: 10 classes\n\n" in card
    assert len(re.findall(r"`class \d+` \(\d+\)", card)) == MAX_NAMED_CLASSES
