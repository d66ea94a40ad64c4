"""Each English message has a Japanese one that says as much, and README.ja.md is what README.md and these say."""

import re
from functools import cache

from babel.messages.catalog import Message
from markdown_it import MarkdownIt

from course.translation.catalogue import documents, load, problems

MARKDOWN = MarkdownIt("commonmark")
CODE = re.compile("`[^`]*`")
TERMS = {  # the English from the beginning of a word, and the one Japanese word for it
    "activation": "活性値",
    "adapter": "アダプタ",
    "annotator": "アノテータ",
    "attention": "アテンション",
    "backward pass": "逆伝播",
    "baseline": "ベースライン",
    "batch": "バッチ",
    "calibrat": "較正",
    "chunk": "チャンク",
    "coverage": "カバレッジ",
    "demonstrat": "手本",
    "distil": "蒸留",
    "draft": "下書き",
    "embedding": "埋め込み",
    "entropy": "エントロピー",
    "fine-tun": "ファインチューニング",
    "forward pass": "順伝播",
    "gradient": "勾配",
    "greedy": "貪欲法",
    "guess": "当て推量",
    "hallucinat": "ハルシネーション",
    "hidden state": "隠れ状態",
    "learning rate": "学習率",
    "logit": "ロジット",
    "noise": "ノイズ",
    "noisy": "ノイズ",
    "optimiser": "オプティマイザ",
    "outlier": "外れ値",
    "preference": "選好",
    "prompt": "プロンプ",  # プロンプト, プロンプティング
    "prun": "枝刈り",
    "quantis": "量子化",
    "repetition penalty": "繰り返しペナルティ",
    "residual stream": "残差ストリーム",
    "retriev": "検索",
    "reward": "報酬",
    "rubric": "採点基準",
    "seed": "シード",
    "temperature": "温度",
    "threshold": "閾値",
    "tokenizer": "トークナイザ",
    "verifier": "検証器",
    "vocabular": "語彙",
    "weight decay": "重み減衰",
}


@cache
def pairs() -> list[tuple[str, Message | None]]:
    """Each English message with its entry in the catalogues."""
    catalogues = {name: load(name) for name in documents()}
    return [(message, catalogues[name].get(message)) for name, ids in documents().items() for message in ids]


def test_no_message_is_without_a_certain_translation_and_none_is_out_of_date() -> None:
    found = list(problems())
    assert not found, "\n".join(["python -m course translate, then edit the catalogues:", *found])


def test_the_marks_of_stress_and_code_around_japanese_words_are_marks() -> None:
    """Beside Japanese punctuation `**` can stay two asterisks, unlike in English."""

    def left_over(text: str) -> int:
        return sum(
            part.content.count("**") + part.content.count("`")
            for token in MARKDOWN.parseInline(text)
            for part in token.children or []
            if part.type == "text"
        )

    wrong = [entry.string for message, entry in pairs() if entry and left_over(entry.string) > left_over(message)]
    assert wrong == []


def test_a_term_has_the_same_translation_everywhere() -> None:
    wrong = [
        f"{term} is {translation}: {message} = {entry.string}"
        for message, entry in pairs()
        for term, translation in TERMS.items()
        if entry and re.search(rf"\b{term}", CODE.sub(" ", message), re.IGNORECASE) and translation not in entry.string
    ]
    assert wrong == []
