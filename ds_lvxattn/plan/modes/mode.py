"""What there is to know of one way for attention to cross the ranks: a strategy with one of its schedules. No torch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ds_lvxattn.plan.cost import Cost, Layer, Pass, Passes, projection_passes
from ds_lvxattn.plan.layer_sizes import LayerSizes
from ds_lvxattn.plan.profile import Profile
from ds_lvxattn.plan.traffic import LayerShape, Traffic

LOCAL_OPERATOR = "ds_lvxattn::local_attention"
ModeKey = tuple[str, str]  # strategy, schedule


def _runs_anywhere(heads: int, kv_heads: int, ranks: int, inner_size: int) -> str | None:
    return None


def _all_heads_everywhere(shape: LayerShape) -> int:
    return 1


@dataclass(frozen=True, eq=False)
class Mode:
    """A strategy and schedule. Config values, choice, memory, recomputation, pictures and tests derive from it.

    Attributes:
        strategy: its value of the config key ``strategy``.
        schedule: its value of the config key ``schedule``; ``auto`` where a strategy has but one way.
        implementation: ``module:function`` of the torch side, imported where it runs. The function takes
            ``(q, k, v, exchange)``, see ``exchange.arguments``.
        operators: registered names of its forward operators, whose results recomputation keeps.
        traffic: ``(shape, rank)``, bytes that ``rank`` receives; exact, of uneven shards too.
        passes: ``(layer, profile)``, predicted seconds of attention and exchange on the slowest rank.
        workspace: ``(layer, profile)``, most bytes that the exchange needs on a rank while it runs, besides q, k, v,
            out and their gradients.
        returned: ``(sizes)``, bytes that the operators return and that every recompute policy keeps.
        inputs: ``(sizes)``, further bytes that they save for the backward pass where nothing is recomputed.
        colour: of its lines and marks in pictures.
        obstacle: ``(heads, kv_heads, ranks, inner_size)``, why it cannot run and what to use instead, or None.
        queries: ``sharded``, or ``replicated`` where every rank holds all of them.
        routes_by_mask: rows travel only to where they see something: without a mask there is nothing to route by.
        pipeline: ``(layer, profile)``, the groups of key heads that follow each other in either pass, where the
            exchange is cut into such; see ``plan.pipeline``.
        two_levels: tells ranks of one node from those of others; on one node, or with one rank a node, it is another.
        host_like: modes whose host times together stand for its own where a profile lacks it.
        step_a_rank: the host issues a step for every rank, so that its time grows with them.
        head_ranks: ``(shape)``, ranks that share out the heads of a layer: those of one node, or of the group, differ
            where they do not divide the heads. 1 where every rank has all of them.
        eligible: whether a config may name it and the planner may choose it.
    """

    strategy: str
    schedule: str
    implementation: str
    operators: tuple[str, ...]
    traffic: Callable[[LayerShape, int], Traffic]
    passes: Callable[[Layer, Profile], Passes]
    workspace: Callable[[Layer, Profile], float]
    returned: Callable[[LayerSizes], int]
    inputs: Callable[[LayerSizes], int]
    colour: str
    obstacle: Callable[[int, int, int, int], str | None] = _runs_anywhere
    queries: Literal["sharded", "replicated"] = "sharded"
    routes_by_mask: bool = False
    pipeline: Callable[[Layer, Profile], tuple[int, int]] | None = None
    two_levels: bool = False
    host_like: tuple[Mode, ...] = ()
    step_a_rank: bool = False
    head_ranks: Callable[[LayerShape], int] = _all_heads_everywhere
    eligible: bool = True

    @property
    def key(self) -> ModeKey:
        """Strategy and schedule."""
        return self.strategy, self.schedule

    @property
    def name(self) -> str:
        """``strategy/schedule``, as profiles and reports write it."""
        return f"{self.strategy}/{self.schedule}"

    def adds(self, layer: Layer) -> bool:
        """Whether it is more than another mode for ``layer``: there is a mask to route by, and there are two levels."""
        one_level = 1 in (layer.shape.inner, layer.shape.nodes)
        return not (self.routes_by_mask and not layer.mask.masked) and not (self.two_levels and one_level)

    def why_not(self, shape: LayerShape) -> str | None:
        """``obstacle`` for a layer of ``shape``."""
        return self.obstacle(shape.heads, shape.kv_heads, shape.ranks, shape.inner)

    def cost(self, layer: Layer, profile: Profile) -> Cost:
        """Time of ``layer``, projection of K and V included."""
        forward, backward, repeated = self.passes(layer, profile)
        first, later, projected_again = projection_passes(layer, profile)
        recomputes = layer.shape.recompute != "none"
        host = self._host(layer, profile)
        return Cost(
            forward, backward, repeated if recomputes else Pass(), first + later, projected_again, sum(host), host[0]
        )  # fmt: skip

    def _host(self, layer: Layer, profile: Profile) -> tuple[float, float]:
        """Seconds that the host takes to issue ``layer``, forward and backward; 0 where the profile does not say."""
        shape, masked = layer.shape, " masked" if layer.mask.masked else ""
        known = self.name + masked in profile.host
        ranks = shape.nodes if self.two_levels and not known else shape.ranks
        forward = backward = 0.0
        for mode in (self,) if known else self.host_like:
            if (host := profile.host.get(mode.name + masked)) is not None:
                repeated = host.repeated if shape.recompute != "none" else 0.0
                scale = ranks / profile.host_ranks if mode.step_a_rank else 1.0
                forward += host.forward * scale
                backward += (host.backward + repeated) * scale
        return forward, backward


# What most modes' operators return and save


def own_results(sizes: LayerSizes) -> int:
    """Output and log-sum-exp of the rank's own rows."""
    return sizes.output_bytes(sizes.rows) + sizes.statistic_bytes(sizes.rows)


def own_inputs(sizes: LayerSizes) -> int:
    """The rank's own q, k and v."""
    return sizes.kv_bytes + sizes.query_bytes(sizes.rows)
