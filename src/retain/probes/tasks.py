"""Probes of what a task taught: its test rows as probe items, asked as they are trained."""

from __future__ import annotations

from typing import Any

from retain.data.chat import choice_index, with_choices

GROUP = "capability"


def task_items(
    rows: list[dict[str, Any]], name: str, tokenizer: Any, list_choices: bool = True
) -> list[dict[str, Any]]:
    """Rows of a probe file for a task's test rows.

    Question rows are scored by the likelihood of each choice after the same chat prompt that training used;
    prompt/response rows by the written answer; text rows by perplexity. Rows that cannot be scored (several
    turns, no answer) are left out.
    """
    items: list[dict[str, Any]] = []
    for number, row in enumerate(rows):
        about = {"id": f"{name}-{number:04d}", "probe": name, "group": GROUP}
        if row.get("choices"):
            prompt = with_choices(row["question"], row["choices"]) if list_choices else row["question"]
            answer = choice_index(row["answer"], row["choices"])
            about |= {"kind": "choice", "layout": "chat"}
            items.append({**about, "prompt": prompt, "choices": list(row["choices"]), "answer": answer})
        elif row.get("messages"):
            turns = [m for m in row["messages"] if m["role"] != "system"]
            if [m["role"] for m in turns] == ["user", "assistant"]:
                items.append(
                    {**about, "kind": "answer", "prompt": turns[0]["content"], "answers": [turns[1]["content"]]}
                )
        elif row.get("prompt"):
            wanted = row.get("answers") or [row.get("final") or row.get("response")]
            if wanted and wanted[0]:
                items.append({**about, "kind": "answer", "prompt": row["prompt"], "answers": [str(w) for w in wanted]})
        elif row.get("text"):
            items.append({**about, "kind": "perplexity", "text": row["text"]})
    written = [item for item in items if item["kind"] == "answer"]
    if written:
        # room for the longest answer that was trained, and a little more
        full = [str(row.get("response") or "") for row in rows] + [item["answers"][0] for item in written]
        longest = max(len(ids) for ids in tokenizer(full)["input_ids"])
        for item in written:
            item["max_tokens"] = int(min(max(longest + 8, 16), 256))
    return items
