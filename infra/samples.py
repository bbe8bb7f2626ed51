"""Records of samples.jsonl, which experiments/report.py shows: groups of trajectories, and rows of targets.

A record has `step` and `kind`. "group": problem (its index), prompt, dead, trajectories, each with tokens
(text pieces), n_given, logprobs (of each token under the trainer), advantage (a number, or one per token),
shown (segments), reward, verdict, cut. "row": tokens, each [target, the model's own prediction, nll, weight];
nll and weight are null before the answer. "answer": one of the last validation.
"""

from collections.abc import Sequence

import numpy as np

from data.tokenizer import Tokenizer
from infra.log import Log

MOST_BYTES = 20_000_000  # of samples.jsonl; nothing is added beyond


def write(log: Log, step: int, record: dict) -> None:
    """Add a record to samples.jsonl, unless that has MOST_BYTES already."""
    path = log.out_dir / "samples.jsonl"
    if not path.exists() or path.stat().st_size < MOST_BYTES:
        log.write("samples", step, record)
    elif not log.full:
        log.full = True
        print(f"note: {path} has {MOST_BYTES / 1e6:.0f} MB; rollouts are no longer written to it")


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """Each token as a string; bytes of a character that several tokens share show as U+FFFD."""
    return [tokenizer.decode([i]) for i in ids]


def choose(groups: list, dead: Sequence[bool], turn: int) -> list:
    """Two groups: one with signal, and by turns the worst and the best of the others."""
    first = next((g for g, d in zip(groups, dead, strict=True) if not d), groups[0])
    others = [g for g in groups if g is not first]
    means = [sum(t.reward for t in g) / len(g) for g in others]
    extreme = (max if turn % 2 else min)(range(len(others)), key=means.__getitem__, default=None)
    return [first] if extreme is None else [first, others[extreme]]


def group_record(tokenizer: Tokenizer, prompt: str, group: list, dead: bool) -> dict:
    """A group of trajectories whose old_logp are those of the trainer."""
    trajectories = []
    for t in group:
        values = np.round(np.asarray(t.advantage, float), 4).tolist()
        trajectories.append({
            "tokens": pieces(tokenizer, t.tokens),
            "n_given": t.n_given,
            "logprobs": np.round(t.old_logp, 3).tolist(),
            "advantage": values,
            "shown": t.shown,
            "reward": t.reward,
            "verdict": t.verdict,
            "cut": not t.finished,
        })  # fmt: skip
    problem = group[0].pick.problem
    return {
        "kind": "group",
        "problem": problem,
        "prompt": prompt,
        "dead": dead,
        "trajectories": trajectories,
    }


def row_records(tokenizer: Tokenizer, tensors: Sequence) -> list[dict]:
    """Rows of targets. tensors, (B, T) each: ids, mask, the model's predictions, nll and weights."""
    records = []
    ids, mask, own, nll, weights = (x.cpu().numpy() for x in tensors)
    for row in range(len(ids)):
        end = int(mask[row].nonzero()[0].max(initial=-1)) + 1
        texts, guesses = pieces(tokenizer, ids[row, :end]), pieces(tokenizer, own[row, :end])
        values = np.round(np.stack((nll[row], weights[row])), 3)[:, :end].T.tolist()
        tokens = [
            [text, guess, *value] if target else [text, None, None, None]
            for text, guess, value, target in zip(texts, guesses, values, mask[row], strict=False)
        ]
        records.append({"kind": "row", "tokens": tokens})
    return records


def rollout_metrics(groups: list, problems: Sequence) -> dict[str, float]:
    """Means over the trajectories of which something was sampled; none if nothing was."""
    sampled = [t for group in groups for t in group if not t.given_whole]
    if not sampled:
        return {}
    solved, shares = {}, []
    for t in sampled:
        solved.setdefault(t.shown, []).append(t.reward == 1)
        shares.append(t.shown / max(1, problems[t.pick.problem].segments))
    n = len(sampled)
    return {
        "critic/rewards/mean": sum(t.reward for t in sampled) / n,
        "solved": sum(map(sum, solved.values())) / n,
        **{f"solved/hint_{k}": sum(v) / len(v) for k, v in sorted(solved.items())},
        "hint/share": sum(shares) / n,
        "response_length/mean": sum(len(t.tokens) - t.n_given for t in sampled) / n,
        "response_length/clip_ratio": sum(not t.finished for t in sampled) / n,
    }
