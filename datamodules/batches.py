"""The contract between data and methods: one typed batch per kind of work, and the records they are made from.

Positions are counted as in `log_probs[:, t] = log p(ids[:, t + 1] | ids[:, : t + 1])`: every tensor of shape
(batch, length - 1) speaks about the token that position t *predicts*.
"""

from dataclasses import dataclass
from typing import NotRequired, TypedDict

from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Message:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What the policy answers: its text and tokens, and the gold answer that a scorer compares with.

    A conversation also has its `messages`, the last of which is the user's, and `script`: what the user says next,
    whatever is answered.
    """

    id: str
    question: str
    gold: str
    ids: list[int]
    messages: tuple[Message, ...] = ()
    script: tuple[str, ...] = ()


@dataclass(frozen=True)
class Trajectory:
    """One sampled response to a prompt, scored.

    `response_ids` are the sampled tokens themselves, never re-tokenised text; the end token is among them exactly when
    it was sampled (`finished`). `lp_mu` are the log-probabilities (nats) of the sampler that produced them, after
    temperature and truncation; `lp_ref` those of the untouched reference model. `step_rewards`, when given, are added
    to the outcome `reward` (which sits on the last token) token by token.
    """

    prompt_id: str
    sample: int
    question: str
    gold: str
    response: str
    prompt_ids: list[int]
    response_ids: list[int]
    finished: bool
    lp_mu: list[float]
    lp_ref: list[float]
    extracted: str | None
    reward: float
    step_rewards: list[float] | None = None


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, as tokens with their end, and what is known of which one is better.

    `label` in [0, 1] is the probability that the first is better than the second. `value` is, for each of them, its
    mean outcome against the answers it was compared with: a probability of winning, a mean score or a return, as the
    method's loss reads it. `lp_ref` are the log-probabilities (nats) of the reference, a number per response token.
    """

    prompt_id: str
    prompt_ids: list[int]
    responses: tuple[list[int], list[int]]
    label: float = 1.0
    value: tuple[float, float] | None = None
    lp_ref: tuple[list[float], list[float]] | None = None


@dataclass(frozen=True)
class Game:
    """Constant-sum games of H stages, or a batch of them: both players start in state 0, each in a copy of its own.

    `payoff[h, s, a, t, b]` in [0, 1] is what the first player gets at stage h for action a in its state s, the second
    player being in t and taking b; the second player gets 1 minus that. `transition[h, s, a]` is the distribution of
    the state after stage h. `nash` is the equilibrium where it is known in closed form.
    """

    payoff: Float[Tensor, "*games stage state action state action"]
    transition: Float[Tensor, "*games stage-1 state action state"]
    nash: Float[Tensor, "*games stage state action"] | None = None


@dataclass(frozen=True)
class Bandit:
    """A bandit with a reference policy: a context x ~ `contexts`, an action a, a reward of mean `reward[x, a]`.

    `noise` is the standard deviation of a reward around its mean. Mean rewards lie in `reward_range`, by which bonuses
    are clipped. With `features` they are linear, <theta, features[x, a]>. With `horizons` there is a table of rewards
    for each of them, to be played for so many rounds.
    """

    name: str
    reward: Float[Tensor, "*horizon context action"]
    log_reference: Float[Tensor, "context action"]
    contexts: Float[Tensor, " context"]
    noise: float
    reward_range: tuple[float, float] = (0.0, 1.0)
    features: Float[Tensor, "context action feature"] | None = None
    horizons: tuple[int, ...] = ()


@dataclass(frozen=True)
class FreshFeatures:
    """A linear bandit whose context is new in every round: `actions` vectors, independent and uniform on the sphere.

    The mean reward of a vector is its product with `theta`; the reference policy is uniform.
    """

    name: str
    theta: Float[Tensor, " feature"]
    actions: int
    noise: float
    reward_range: tuple[float, float] = (0.0, 1.0)


@dataclass(frozen=True)
class DecisionProcess:
    """A process of H steps with a reference policy, its states s, actions a and mean rewards in [0, 1] as tables.

    The first state is drawn from `start`, the state after step h from `transition[h, s, a]`. `noise` is the standard
    deviation of a reward around its mean.
    """

    name: str
    reward: Float[Tensor, "step state action"]
    transition: Float[Tensor, "step-1 state action state"]
    log_reference: Float[Tensor, "step state action"]
    start: Float[Tensor, " state"]
    noise: float


@dataclass(frozen=True)
class BanditLog:
    """What was logged in a bandit, a row at a time: rewards of an action, or labels of two of them.

    `outcome` is the reward, or 1 where the first action won and 0 where the second did. `behaviour[x, a]` is the policy
    that chose the actions, the reference's unless the log has propensities.
    """

    context: Int[Tensor, " row"]
    actions: Int[Tensor, "row chosen"]
    outcome: Float[Tensor, " row"]
    behaviour: Float[Tensor, "context action"]


@dataclass(frozen=True)
class Mixture:
    """A mixture of Gaussians in float64: what it is made of is all that is to be known of it."""

    weights: Float[Tensor, " component"]
    means: Float[Tensor, "component d"]
    covariances: Float[Tensor, "component d d"]


class TokenBatch(TypedDict):
    """Sequences with the tokens to learn marked.

    `token_share` is the number of marked tokens in the whole optimizer step divided by the micro-batches that make it
    up (processes x accumulation). A sum over this micro-batch divided by it is a mean over the global batch once the
    micro-batches are averaged, on any number of processes. With `positions`, which count from 0 in each of them, a row
    holds several sequences end to end that must not see each other.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length-1"]
    token_share: Float[Tensor, ""]
    positions: NotRequired[Int[Tensor, "batch length"]]


class WindowBatch(TypedDict):
    """Windows of a stream of text, for language modelling: every token is predicted from those before it.

    As `TokenBatch`; `mask` leaves out what lies beyond the end of the stream. `positions`, which count from 0 in each
    document, are there when documents must not see each other.
    """

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length-1"]
    token_share: Float[Tensor, ""]
    positions: NotRequired[Int[Tensor, "batch length"]]


class PromptBatch(TypedDict):
    """Problems to answer."""

    prompts: list[Prompt]


class TrajectoryBatch(TypedDict):
    """Scored responses with the log-probabilities of behaviour and reference (nats, zero outside `mask`)."""

    ids: Int[Tensor, "batch length"]
    mask: Bool[Tensor, "batch length-1"]
    token_share: Float[Tensor, ""]
    rewards: Float[Tensor, "batch length-1"]
    lp_mu: Float[Tensor, "batch length-1"]
    lp_ref: Float[Tensor, "batch length-1"]
    outcome: Float[Tensor, " batch"]
    prompt_length: Int[Tensor, " batch"]


class PreferenceBatch(TypedDict):
    """Two responses to one prompt; `label` in [0, 1] is the probability that the first is the better one.

    `lp_ref` (nats, zero outside `mask`) and `value` are as in `Pair`, where all pairs of the batch have them. Every
    micro-batch of a step has the same number of pairs: a mean over them is a mean over the global batch.
    """

    ids: Int[Tensor, "batch 2 length"]
    mask: Bool[Tensor, "batch 2 length-1"]
    label: Float[Tensor, " batch"]
    token_share: Float[Tensor, ""]
    lp_ref: NotRequired[Float[Tensor, "batch 2 length-1"]]
    value: NotRequired[Float[Tensor, "batch 2"]]


class PackedPreferenceBatch(TypedDict):
    """Pairs end to end in rows, the prompt of each once: it is followed by both responses, which do not see each other.

    `branch` is 3 n in the prompt of pair n, 3 n + 1 in its first and 3 n + 2 in its second response, each of which
    begins with another copy of the prompt's last token, whose prediction its first token is; -1 is padding. `positions`
    count as if each response stood behind the prompt by itself. The rest is as in `PreferenceBatch`.
    """

    ids: Int[Tensor, "rows length"]
    mask: Bool[Tensor, "rows length-1"]
    positions: Int[Tensor, "rows length"]
    branch: Int[Tensor, "rows length"]
    label: Float[Tensor, " batch"]
    token_share: Float[Tensor, ""]
    lp_ref: NotRequired[Float[Tensor, "rows length-1"]]
    value: NotRequired[Float[Tensor, "batch 2"]]


class PointBatch(TypedDict):
    """Points of a distribution that is known exactly, and the chance that belongs to each of them.

    Standard normal noise, and a number uniform in [0, 1) that chooses a time: what a point is trained with does not
    depend on the process that it is dealt to.
    """

    points: Float[Tensor, "batch d"]
    noise: Float[Tensor, "batch d"]
    uniform: Float[Tensor, " batch"]


class RoundBatch(TypedDict):
    """Rounds of a simulation to play next, by their numbers from 0; what is random in one depends on seed and number.

    Without rounds there is nothing to play, only to look at what has been reached.
    """

    rounds: Int[Tensor, " rounds"]


class DensityBatch(TypedDict):
    """Cubes of cryo-EM density, axes z, y, x, in the units that a prior is trained in: (v / scale - mean) / std.

    v is a map's own density, `scale` the map's value that counts as 1 (a high percentile of the whole map), `mean` and
    `std` belong to the data set and are the same in every batch. `voxel_size` is in angstrom. The centre of a cube is
    the voxel D // 2 of each axis. `place` is a crop's place in the endless stream of training, or its number in an
    evaluation: what a method draws for a row may depend on the seed and this alone, and is then the same on any number
    of processes. In an evaluation `place` may occur twice, on two processes, so that all have as many batches. `ids`
    are the entries' names. Half maps and a mask are there where all entries of the data set have them: `half_maps` in
    the same units and with the same scale as `voxels`, `mask` in [0, 1].
    """

    voxels: Float[Tensor, "batch depth height width"]
    voxel_size: Float[Tensor, " batch"]
    scale: Float[Tensor, " batch"]
    mean: Float[Tensor, ""]
    std: Float[Tensor, ""]
    place: Int[Tensor, " batch"]
    ids: list[str]
    half_maps: NotRequired[Float[Tensor, "batch 2 depth height width"]]
    mask: NotRequired[Float[Tensor, "batch depth height width"]]


class CategoryBatch(TypedDict):
    """Rows of d letters, numbers from 0: what a categorical process noises and learns to restore."""

    x: Int[Tensor, "batch d"]
