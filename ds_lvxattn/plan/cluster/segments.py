"""What a rank does in a step, layer by layer: kernels, exchange, the host's time to issue them, ZeRO's transfers.

No torch.
"""

from __future__ import annotations

from dataclasses import dataclass

from ds_lvxattn.plan.choice import Candidate
from ds_lvxattn.plan.cluster import work
from ds_lvxattn.plan.cluster.job import ClusterJob
from ds_lvxattn.plan.cluster.work import ELEMENT, Both
from ds_lvxattn.plan.cost import Cost
from ds_lvxattn.plan.dense import ENCODER_LAYER, LINEAR, TEXT_LAYER, host_time
from ds_lvxattn.plan.modes import LOCAL
from ds_lvxattn.plan.profile import HostTime, Profile
from ds_lvxattn.plan.timeline import Segment
from ds_lvxattn.plan.zero import MATRICES, PARAMETERS, Transfers

# Kernels of a layer, which the driver's queue holds: of the encoder, and of a text layer forward and backward.
ENCODER_LAUNCHES, FORWARD_LAUNCHES, BACKWARD_LAUNCHES = 18, 70, 120
ENCODER_MATRICES, ENCODER_PARAMETERS = 6, 16  # of an encoder layer
ENCODER_SHARE = 0.1  # of the memory: a smaller frozen encoder is gathered once a step, see ``training/zero3.py``

Passed = tuple[Segment, float]  # of a backward pass, with the number of its parameters that train
Layers = tuple[list[Segment], list[Passed]]  # of a layer's forward and of its backward pass


def segments(job: ClusterJob, cross: Candidate, own: Candidate, profile: Profile) -> list[Segment]:
    """What a rank does in a step, in its order.

    Args:
        cross, own: what cross-attention and self-attention layers run as.
    """
    m, layers = job.model, _Layers(job, profile, Transfers(profile, job.states))
    kinds = [layers.own(own)] * m.self_layers
    if m.cross_layers:  # evenly among the others
        across = layers.cross(cross)
        for number in reversed(range(m.cross_layers)):
            kinds.insert(round((number + 1) * m.self_layers / m.cross_layers), across)
    words, words_back = layers.vocabulary()
    forward = [segment for first, _ in kinds for segment in first]
    backward = [words_back, *(segment for _, then in reversed(kinds) for segment in then)]
    return [
        *layers.encoder(), *forward, words, *layers.transfers.reduced(backward),
        *layers.transfers.update(layers.released),
    ]  # fmt: skip


@dataclass(frozen=True)
class _Layers:
    job: ClusterJob
    profile: Profile
    transfers: Transfers

    def encoder(self) -> list[Segment]:
        """The frozen encoder, a segment for each portion of the frames, and both passes of the projector."""
        m, frames = self.job.model, self.job.keys / self.job.model.frame_tokens
        portions = work.encoder_portions(m, frames)
        device = m.vision_layers * work.encoder_layer(self.profile, m, frames) / portions
        of_layer = host_time(self.profile, ENCODER_LAYER).forward
        host = m.vision_layers * (of_layer + host_time(self.profile, f"{LOCAL.name} masked").forward)
        if self._fetches:  # DeepSpeed's products add a bias in a pass of its own
            device += m.vision_layers * work.encoder_biases(self.profile, m, frames) / portions
            host += m.vision_layers * ENCODER_MATRICES * host_time(self.profile, LINEAR).forward
        once = m.vision_parameters * ELEMENT <= ENCODER_SHARE * self.profile.memory
        matrices = ENCODER_MATRICES * m.vision_layers
        gathering = self.transfers.gather_host(1 if once else matrices, matrices)
        found = []
        for portion in range(portions):
            gathers = not (once and portion) and not self.job.kept
            found += [
                Segment("encoder", 0.0, gathering * gathers),  # ahead of all that it launches
                Segment(
                    "encoder", device, host, m.vision_layers * ENCODER_LAUNCHES,
                    gather=self.transfers.gather(m.vision_parameters * gathers), fetched=self._fetches and gathers,
                ),
            ]  # fmt: skip
        projector = work.projector(self.profile, m, frames * m.frame_tokens, self.job.features_train)
        return [*found, Segment("projection", sum(projector))]

    def own(self, candidate: Candidate) -> Layers:
        """A self-attention layer."""
        m, trains = self.job.model, self.job.model.keys_in_text
        rest = work.self_layer(self.profile, m, self.job.rows, trains)
        return self._layer("text", rest, candidate, m.self_parameters, trains)

    def cross(self, candidate: Candidate) -> Layers:
        """A cross-attention layer: its attention module, and what belongs to the text behind it."""
        m = self.job.model
        inside, around = work.cross_layer(self.profile, m, self.job.rows)
        again = self.job.recompute == "kv"  # with ``layer`` all of ``inside`` is
        inside = inside.plus(work.visual_keys(self.profile, m, self.job.keys, again, self.job.features_train))
        first, then = self._layer("cross-attention", inside, candidate, m.cross_parameters, True)
        back = Segment("text", around.backward + self._again(around))
        return [*first, Segment("text", around.forward)], [(back, 0.0), *then]

    def vocabulary(self) -> tuple[Segment, Passed]:
        """The output projection and the loss; with the embeddings' gradient, where they train."""
        m, trains = self.job.model, self.job.model.keys_in_text
        size = m.vocabulary * m.width
        both = work.vocabulary(self.profile, m, self.job.rows, trains)
        gather = 0.0 if self.job.kept else self.transfers.gather(size)
        forward = Segment("text", both.forward, gather=gather, fetched=self._fetches)
        return forward, (Segment("text", both.backward), 2.0 * size * trains)

    @property
    def _fetches(self) -> bool:
        """Whether DeepSpeed gathers parameters for each use."""
        return self.job.stage == 3 and not self.job.kept

    @property
    def released(self) -> float:
        """Parameters that stage 3 looks at when it releases what is gathered."""
        m = self.job.model
        if not self._fetches:
            return 0.0
        return float(PARAMETERS * (m.self_layers + m.cross_layers) + ENCODER_PARAMETERS * m.vision_layers)

    def _layer(self, part: str, rest: Both, candidate: Candidate, parameters: int, trains: bool) -> Layers:
        """A layer of ``parameters``, of which ``rest`` is what it computes besides attention."""
        cost = candidate.cost
        assert cost is not None
        attention, exchange, host = _attention(cost), _exchange(cost), host_time(self.profile, TEXT_LAYER)
        gather = again = self.transfers.gather(parameters)
        gathering = self.transfers.gather_host(MATRICES if trains else 1, MATRICES)
        if self.job.kept:
            gather, again, gathering = gather * trains, 0.0, 0.0  # what trains, once, without hooks
        elif self._fetches:
            own = host_time(self.profile, LINEAR)
            host = HostTime(host.forward + MATRICES * own.forward, host.backward + MATRICES * own.backward, 0.0)
        first = Segment(
            part, attention.forward + rest.forward, cost.host_forward + host.forward + gathering, FORWARD_LAUNCHES,
            exchange.forward, gather, self._fetches,
        )  # fmt: skip
        then = Segment(
            part, attention.backward + rest.backward + self._again(rest),
            cost.host - cost.host_forward + host.backward + gathering, BACKWARD_LAUNCHES, exchange.backward, again,
            self._fetches,
        )  # fmt: skip
        return [first], [(then, float(parameters * trains))]

    def _again(self, both: Both) -> float:
        """Seconds of what the backward pass computes again."""
        return both.forward if self.job.recompute == "layer" else 0.0


def _attention(cost: Cost) -> Both:
    """Kernels and passes of a layer's attention, K and V projected."""
    once = cost.projection / 3  # forward; twice as much backward
    return Both(
        cost.forward.kernel + cost.forward.passes + once,
        cost.backward.kernel + cost.backward.passes + cost.repeated.kernel + cost.repeated.passes
        + cost.projection - once + cost.projection_repeated,
    )  # fmt: skip


def _exchange(cost: Cost) -> Both:
    """What no kernel hides of a layer's exchange."""
    return Both(cost.forward.exchange, cost.backward.exchange + cost.repeated.exchange)
