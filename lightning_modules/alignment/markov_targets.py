"""What an answer within a conversation is worth in MPO and OMPO (arXiv 2502.12678, section 3.4 and equation 5).

`steps_left` is H - h + 1, the turns from this one to the end. A table (K, K') has the mean over these turns of
P(answer k, and what follows it, beats answer k' and what follows that).
"""

from jaxtyping import Float
from torch import Tensor

RETURNS = ("one_step", "rollout")


def q_values(table: Float[Tensor, "k opponents"], steps_left: int) -> Float[Tensor, " k"]:
    """Q of each answer: the turns it has won on average, against opponents from the same state, itself included."""
    return steps_left * table.mean(1)


def tie(steps_left: int) -> float:
    """Q of a tie, log Z / beta as the paper approximates it: half of the turns that count."""
    return steps_left / 2


def advantages(
    current: Float[Tensor, " k"],
    previous: Float[Tensor, " k"] | None,
    center: float,
    tau: str | float = "center",
) -> Float[Tensor, " k"]:
    """What the log-ratio is regressed onto, times beta: Q_tt - center, or 2 Q_tt - Q_t,t-1 - tau where there is one.

    `previous` is Q against the answers of the policy before. With tau = center a tie leaves the policy unchanged; the
    paper's runs took tau = 0, with which every sampled answer is pushed up at a tie.
    """
    if previous is None:
        return current - center
    return 2 * current - previous - (center if tau == "center" else tau)


def counted_turns(returns: str, steps_left: int) -> int:
    """The turns that count: this one, or all that are left. Raises ValueError."""
    if returns not in RETURNS:
        raise ValueError(f"model.returns={returns}: there are {', '.join(RETURNS)}")
    return 1 if returns == "one_step" else steps_left
