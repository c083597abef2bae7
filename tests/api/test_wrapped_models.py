"""Models in modules that wrap them: guidance, a whole loop, two experts; and copies and replaced weights."""

import copy

import pytest
import torch
from loop_cases import LEVELS, OPTIONS, TWICE, Dit, latents, prompts
from torch import nn

import svg2_compile
from svg2_compile import clock

HOWS = ("whole", "blocks")
EACH = [(generation, step, "0") for generation in range(2) for step in range(3)]


@pytest.fixture
def ticks(monkeypatch, no_grad_and_a_fresh_start):
    """Return a function that runs something and returns generation, step and branch of each forward in it."""
    seen = []
    tick = clock.DenoiseClock.tick

    def follow(self, model, observation):
        now = tick(self, model, observation)
        seen.append((now.run, now.step, now.stream))
        return now

    monkeypatch.setattr(clock.DenoiseClock, "tick", follow)

    def run(function):
        function()
        runs = list(dict.fromkeys(run for run, _, _ in seen))
        return [(runs.index(run), step, stream) for run, step, stream in seen]

    return run


def compiled(how: str, **options: object) -> Dit:
    model = Dit().eval()
    for each in (model,) if how == "whole" else model.blocks:
        each.compile(backend="svg2", options=OPTIONS | options)
    return model


class Guided(nn.Module):
    """Calls its model for both branches, with a noise level in another unit."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.inner = compiled(how)

    def forward(self, x, sigma, cond, uncond):
        with_prompt, without = (self.inner(x, 1000 * sigma, text) for text in (cond, uncond))
        return without + 3 * (with_prompt - without)


class Sampler(nn.Module):
    """Has the whole loop in its forward."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.denoiser = compiled(how)

    def forward(self, text):
        x = latents()
        for level in LEVELS:
            x = x - 0.1 * self.denoiser(x, torch.tensor([level]), text)
        return x


class Experts(nn.Module):
    def __init__(self, how: str) -> None:
        super().__init__()
        self.high, self.low = compiled(how, dense_layers=1), compiled(how, dense_layers=1)

    def forward(self, x, level, text):
        return (self.high if level > 500 else self.low)(x, torch.tensor([level]), text)


@pytest.mark.parametrize("how", HOWS)
def test_each_call_that_a_wrapper_makes_is_a_forward(ticks, how):
    def generate():
        model, texts = Guided(how), prompts()
        for _ in range(2):
            for level in LEVELS:
                model(latents(), torch.tensor([level / 1000]), *texts)

    assert ticks(generate) == TWICE


@pytest.mark.parametrize("how", HOWS)
def test_a_loop_inside_a_module_is_a_loop(ticks, how):
    def generate():
        model = Sampler(how)
        for _ in range(2):
            model(prompts()[0])

    assert ticks(generate) == EACH


def layers(model: nn.Module) -> list[tuple[str, int]]:
    sites = svg2_compile.report(model).sites
    return [(site.path.removesuffix(".scaled_dot_product_attention"), site.sparse_calls) for site in sites]


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("together", [True, False])
def test_experts_share_the_steps_and_have_first_layers_of_their_own(ticks, how, together):
    experts = Experts(how)
    parts = (experts,) if together else (experts.high, experts.low)

    def generate():
        for _ in range(2):
            text = prompts()[0]
            for level in LEVELS:
                if together:
                    experts(latents(), level, text)
                else:
                    (experts.high if level > 500 else experts.low)(latents(), torch.tensor([level]), text)

    assert ticks(generate) == EACH
    found = dict(layers(experts))
    assert found == {"high.blocks.0": 0, "high.blocks.1": 4, "low.blocks.0": 0, "low.blocks.1": 2}
    assert sum(len(layers(part)) for part in parts) == 4


@pytest.mark.parametrize("how", HOWS)
def test_a_copy_and_replaced_weights_are_told_apart(ticks, how):
    first = compiled(how, dense_layers=1)
    text = prompts()[0]

    def generate(model):
        for level in LEVELS:
            model(latents(), torch.tensor([level]), text)

    generate(first)
    second = copy.deepcopy(first)
    for each in (second,) if how == "whole" else second.blocks:
        each.compile(backend="svg2", options=OPTIONS | {"dense_layers": 1})
    first.load_state_dict({name: tensor.clone() for name, tensor in first.state_dict().items()}, assign=True)
    assert ticks(lambda: (generate(first), generate(second)))
    assert dict(layers(first)) == {"blocks.0": 0, "blocks.1": 6}
    assert dict(layers(second)) == {"blocks.0": 0, "blocks.1": 3}
