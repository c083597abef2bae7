"""What the kernels are to reach on a GPU: gate, target and stretch, and where a figure stands between them."""

from dataclasses import dataclass

from shapes import HUNYUAN_720P, WAN_14B_720P


@dataclass(frozen=True, slots=True)
class Goal:
    """Three levels of one figure, from what ships to what would be remarkable."""

    gate: float
    target: float
    stretch: float

    def verdict(self, value: float) -> str:
        """Return the highest level that ``value`` reaches; levels that fall ask for small values."""
        sign = 1 if self.stretch > self.gate else -1
        for name in ("stretch", "target", "gate"):
            if sign * value >= sign * float(getattr(self, name)):
                return name
        return "below gate"

    def __str__(self) -> str:
        return f"{self.gate:g}/{self.target:g}/{self.stretch:g}"


NO_GOAL = "no goal"
# Operations issued to the tensor cores per second, over those of dense cuDNN; by head dimension.
EPS_TILE = {64: Goal(0.75, 0.88, 0.95), 128: Goal(0.75, 0.90, 0.95)}
# Operations of selected pairs per second, over those of dense cuDNN, at head dimension 128.
EPS_SEL_FEW = Goal(0.65, 0.80, 0.88)  # up to 500 key clusters
EPS_SEL_MANY = Goal(0.55, 0.72, 0.82)
# Time of clustering, permuting and selecting over that of dense cuDNN, in percent; (shape, iterations, many clusters).
OVERHEAD = {
    (WAN_14B_720P.name, 1, False): Goal(3.0, 2.0, 1.5),
    (HUNYUAN_720P.name, 1, False): Goal(2.2, 1.4, 1.0),
    (WAN_14B_720P.name, 2, False): Goal(5.0, 3.0, 2.3),
    (HUNYUAN_720P.name, 2, False): Goal(3.5, 2.2, 1.6),
    (WAN_14B_720P.name, 2, True): Goal(7.0, 4.5, 3.5),
    (HUNYUAN_720P.name, 2, True): Goal(5.0, 3.2, 2.5),
}


def eps_sel_goal(dim: int, k_clusters: int) -> Goal | None:
    """Return the goal for selected pairs; there is none but for head dimension 128."""
    if dim != 128:
        return None
    return EPS_SEL_FEW if k_clusters <= 500 else EPS_SEL_MANY


def overhead_goal(shape: str, iterations: int, k_clusters: int) -> Goal | None:
    """Return the goal for the overhead, where there is one."""
    return OVERHEAD.get((shape, iterations, k_clusters > 500))


def judged(value: float, goal: Goal | None) -> str:
    """Return the verdict and the three levels."""
    return NO_GOAL if goal is None else f"{goal.verdict(value)} ({goal})"


# A step of all sparse layers: time of selected pairs is that of dense attention over this, clustering and selection
# take this share of dense attention more.
SELECTED_EFFICIENCY = 0.80
STEP_OVERHEAD = {"wan-1.3b-480p": 0.03, "wan-14b-720p": 0.03, "hunyuan-720p": 0.025}
# Asked for at a density of 0.25.
STEP_SPEEDUP = {("wan-14b-720p", 0.25): 1.85, ("hunyuan-720p", 0.25): 2.29}


@dataclass(frozen=True, slots=True)
class StepGoal:
    """How much faster a step may become."""

    ideal: float
    """If attention took its density and nothing else changed."""
    target: float
    """With the efficiency and the overhead above."""
    asked: float | None
    """The figure that the model is to reach at this density, where there is one."""


def step_goal(model: str, attention_share: float, density: float) -> StepGoal:
    """Return what a step with this share of attention may gain (Amdahl)."""

    def speedup(attention: float) -> float:
        return 1 / (1 - attention_share + attention_share * attention)

    target = speedup(density / SELECTED_EFFICIENCY + STEP_OVERHEAD[model])
    return StepGoal(speedup(density), target, STEP_SPEEDUP.get((model, density)))
