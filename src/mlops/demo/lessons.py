"""What the demo's two adapters learn: to answer as JSON, and to answer in capitals.

The questions and answers come from `pydoc_data.topics`, English text about Python that every
installation carries.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

Message = dict[str, str]


@dataclass(frozen=True)
class Lesson:
    """One way of answering.

    Attributes:
        name: the adapter's name.
        style: what it does, for people.
        rewrite: makes the wanted answer from a topic and a plain answer.
    """

    name: str
    style: str
    rewrite: Callable[[str, str], str]


LESSONS = (
    Lesson(
        "json",
        "answers as JSON",
        lambda topic, text: json.dumps({"topic": topic, "answer": text}),
    ),
    Lesson("capitals", "answers in capitals", lambda topic, text: text.upper()),
)

QUESTIONS = ("Explain {topic}.", "What is {topic}?", "Tell me about {topic}.")


def conversations(lesson: Lesson) -> list[dict[str, list[Message]]]:
    """Chats for mlx-lm's trainer: a question about each topic, answered in the lesson's way."""
    chats = []
    for topic, text in plain_answers():
        for question in QUESTIONS:
            chats.append(
                {
                    "messages": [
                        {"role": "user", "content": question.format(topic=topic)},
                        {"role": "assistant", "content": lesson.rewrite(topic, text)},
                    ]
                }
            )
    return chats


def plain_answers(max_chars: int = 110) -> list[tuple[str, str]]:
    """Pairs of topic and the first prose sentence of its help page, in the order of topics."""
    from pydoc_data.topics import topics

    pairs = []
    for name, page in sorted(topics.items()):
        topic = name.replace("-", " ").replace("_", " ").strip()
        for paragraph in re.split(r"\n\s*\n", page):
            text = re.sub(r"[`*\"\\]", "", re.sub(r"\s+", " ", paragraph)).strip()
            sentence = re.split(r"(?<=[.!?]) ", text)[0]
            if re.fullmatch(r"[A-Z][a-z].{25,}\.", sentence) and len(sentence) <= max_chars:
                pairs.append((topic, sentence))
                break
    return pairs
