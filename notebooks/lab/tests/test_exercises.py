"""exercises.py: the notebooks' own solutions are right, and a typical mistake gets its sentence."""

import json
import re
from pathlib import Path

import pytest
import torch

from notebooks.lab import exercises

torch.set_num_threads(1)
NOTEBOOKS = sorted(Path(exercises.__file__).parents[1].glob("0[1-6]_*.ipynb"))


def signs(*shape):
    return 2.0 * torch.randint(0, 2, shape) - 1


# -- what is right ---------------------------------------------------------------------------------


def cells(path, kind):
    found = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return ["".join(cell["source"]) for cell in found if cell["cell_type"] == kind]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_has_two_stubs_and_their_solutions_below(path):
    checks = re.findall(r'check\("(\w+)", (\w+)\)', "\n".join(cells(path, "code")))
    assert len(checks) == 2
    folded = re.findall(r"<details>.*?</details>", "\n".join(cells(path, "markdown")), re.S)
    solutions = [re.search(r"```python\n(.*?)```", text, re.S) for text in folded]
    scope = {}
    exec("import math\n\nimport torch\n\n" + "\n".join(x[1] for x in solutions if x), scope)
    stubs = {"math": scope["math"], "torch": torch}
    for source in cells(path, "code"):
        if re.match(r"def my_\w+\(", source):
            exec(source, stubs)
    for name, function in checks:
        assert exercises.verdict(name, stubs[function]) == "not yet"
        assert exercises.verdict(name, scope[function]) == "right"


def test_each_exercise_is_in_one_notebook():
    code = "\n".join(source for path in NOTEBOOKS for source in cells(path, "code"))
    assert re.findall(r'check\("(\w+)"', code) == list(exercises.EXERCISES)


def test_other_ways_that_are_right_too():
    def scalar_products(matvec, d, r, m):
        """One product at a time, and G not projected on the left: the same trace."""
        S, total = torch.randn(d, r), 0.0
        Q = torch.linalg.qr(torch.cat([matvec(s[:, None]) for s in S.T], 1)).Q
        for q in Q.T:
            total += float(q @ matvec(q))
        for g in torch.randn(m, d):
            total += float(g @ matvec(g - Q @ (Q.T @ g))) / m
        return total

    assert exercises.verdict("hutchpp", scalar_products) == "right"

    def surrogate(w):
        """Without tensors' own rounding: the code by comparisons."""
        gamma = sum(abs(x) for x in w.tolist()) / len(w)
        code = [(x > gamma / 2) * 1.0 - (x < -gamma / 2) * 1.0 for x in w.tolist()]
        return w + (torch.tensor(code) * gamma - w).detach()

    assert exercises.verdict("ste", surrogate) == "right"
    assert exercises.verdict("quantize", surrogate) == "right"


# -- typical mistakes ------------------------------------------------------------------------------

MISTAKES = []  # (a word for it, the exercise, the function, what must be said)


def mistake(what, name, said):
    return lambda function: MISTAKES.append((what, name, function, said)) or function


@mistake("gamma forgotten", "quantize", "Gamma is forgotten")
def _(w):
    return torch.clamp(torch.round(w), -1, 1)


@mistake("ties up", "quantize", "A tie goes up")
def _(w):
    gamma = w.abs().mean()
    return gamma * torch.clamp(torch.floor(w / gamma + 0.5), -1, 1)


@mistake("codes for weights", "quantize", "It returns codes")
def _(w):
    return torch.round(w / w.abs().mean()).clamp(-1, 1)


@mistake("no clipping", "quantize", "Clip the rounded code")
def _(w):
    gamma = w.abs().mean()
    return gamma * torch.round(w / gamma)


@mistake("gradient through gamma", "ste", "A gradient goes through gamma")
def _(w):
    gamma = w.abs().mean()
    hard = gamma * torch.round(w.detach() / gamma.detach()).clamp(-1, 1)
    return hard + (w - w.detach())


@mistake("gradient through gamma, in z", "ste", "A gradient goes through gamma")
def _(w):
    z = w / w.abs().mean()
    return w.abs().mean() * (z + (z.round().clamp(-1, 1) - z).detach())


@mistake("no gradient", "ste", "No gradient reaches w")
def _(w):
    gamma = w.detach().abs().mean()
    return gamma * torch.round(w / gamma).clamp(-1, 1).detach()


@mistake("distances not squared", "soft", "The distances are not squared")
def _(w, tau):
    gamma, q = w.abs().mean(), torch.tensor([-1.0, 0.0, 1.0])
    pi = torch.softmax(-(w[:, None] / gamma - q).abs() / tau, 1)
    return gamma * (q * pi).sum(1)


@mistake("gamma forgotten in the distances", "soft", "Gamma is forgotten")
def _(w, tau):
    q = torch.tensor([-1.0, 0.0, 1.0])
    return (q * torch.softmax(-(w[:, None] - q) ** 2 / tau, 1)).sum(1)


@mistake("codes for weights", "soft", "It returns mean codes")
def _(w, tau):
    q = torch.tensor([-1.0, 0.0, 1.0])
    return torch.softmax(-(w[:, None] / w.abs().mean() - q) ** 2 / tau, 1) @ q.to(w)


@mistake("the exponent's sign", "soft", "The sign of the exponent")
def _(w, tau):
    gamma, q = w.abs().mean(), torch.tensor([-1.0, 0.0, 1.0], dtype=w.dtype)
    return gamma * torch.softmax((w[:, None] / gamma - q) ** 2 / tau, 1) @ q


@mistake("exp that underflows", "soft", "torch.softmax subtracts the largest exponent")
def _(w, tau):
    gamma, q = w.abs().mean(), torch.tensor([-1.0, 0.0, 1.0])
    a = torch.exp(-(w[:, None] / gamma - q) ** 2 / tau)
    return gamma * (q * a).sum(1) / a.sum(1)


@mistake("tau below zero is taken", "soft", "tau is below zero")
def _(w, tau):
    gamma, q = w.abs().mean(), torch.tensor([-1.0, 0.0, 1.0], dtype=w.dtype)
    return gamma * torch.softmax(-(w[:, None] / gamma - q) ** 2 / tau, 1) @ q


@mistake("gradient through gamma", "slope", "A gradient goes through gamma")
def _(w, tau):
    w = w.detach().requires_grad_(True)
    gamma, q = w.abs().mean(), torch.tensor([-1.0, 0.0, 1.0], dtype=w.dtype)
    H = gamma * torch.softmax(-(w[:, None] / gamma - q) ** 2 / tau, 1) @ q
    return torch.autograd.grad(H.sum(), w)[0]


@mistake("no 2 / tau", "slope", "the factor 2 / tau is missing")
def _(w, tau):
    q = torch.tensor([-1.0, 0.0, 1.0], dtype=w.dtype)
    pi = torch.softmax(-(w[:, None] / w.abs().mean() - q) ** 2 / tau, 1)
    return pi @ q**2 - (pi @ q) ** 2


@mistake("no mean in the variance", "slope", "this is E[q^2]")
def _(w, tau):
    q = torch.tensor([-1.0, 0.0, 1.0], dtype=w.dtype)
    return 2 / tau * torch.softmax(-(w[:, None] / w.abs().mean() - q) ** 2 / tau, 1) @ q**2


@mistake("S reused as G", "hutchpp", "S is reused as G")
def _(matvec, d, r, m):
    S = signs(d, r)
    Q, _ = torch.linalg.qr(matvec(S))
    rest = S[:, :m] - Q @ (Q.T @ S[:, :m])
    return torch.trace(Q.T @ matvec(Q)) + torch.trace(rest.T @ matvec(rest)) / m


@mistake("no 1/m", "hutchpp", "the 1/m is missing")
def _(matvec, d, r, m):
    S, G = signs(d, r), signs(d, m)
    Q, _ = torch.linalg.qr(matvec(S))
    rest = G - Q @ (Q.T @ G)
    return torch.trace(Q.T @ matvec(Q)) + torch.trace(rest.T @ matvec(rest))


@mistake("G not projected", "hutchpp", "G is not projected")
def _(matvec, d, r, m):
    Q, G = torch.linalg.qr(matvec(signs(d, r)))[0], signs(d, m)
    return torch.trace(Q.T @ matvec(Q)) + torch.trace(G.T @ matvec(G)) / m


@mistake("products wasted", "hutchpp", "products used over 2 r + m")
def _(matvec, d, r, m):
    return torch.trace(matvec(torch.eye(d)))


@mistake("no logarithm", "scores", "The logarithm is missing")
def _(h, kappa):
    return torch.sigmoid(kappa * (h - h.mean()) / h.std(unbiased=False))


@mistake("the sample's deviation", "scores", "divide by n")
def _(h, kappa):
    return torch.sigmoid(kappa * (h.log() - h.log().mean()) / (h.log().std() + 1e-8))


@mistake("kappa forgotten", "scores", "Kappa is forgotten")
def _(h, kappa):
    return torch.sigmoid((h.log() - h.log().mean()) / (h.log().std(unbiased=False) + 1e-8))


@mistake("epsilon forgotten", "scores", "add epsilon to sigma")
def _(h, kappa):
    return torch.sigmoid(kappa * (h.log() - h.log().mean()) / h.log().std(unbiased=False))


@mistake("over all steps", "pressure", "It rises over all T steps")
def _(t, T, rho):
    return t / T


@mistake("pressure above 1", "pressure", "p is at most 1")
def _(t, T, rho):
    return t / (rho * T)


@mistake("rho = 0", "pressure", "rho = 0: it raises ZeroDivisionError")
def _(t, T, rho):
    return min(1, t / (rho * T))


@mistake("alpha's sign", "temperature", "The sign of alpha")
def _(t, T, rho, tau_init, s, alpha):
    share = max(0, t - rho * T) / (T - rho * T)
    cosine = torch.cos(torch.tensor(torch.pi * share))
    return tau_init / 2 * (1 + cosine) * torch.exp(torch.tensor(-alpha * s))


@mistake("tau below zero", "temperature", "Tau falls below zero")
def _(t, T, rho, tau_init, s, alpha):
    share = max(0, t - rho * T) / (T - rho * T)
    return tau_init / 2 * torch.cos(torch.tensor(torch.pi * share)) * 2.718281828 ** (alpha * s)


@mistake("no compress stage", "temperature", "It cools from the first step")
def _(t, T, rho, tau_init, s, alpha):
    return tau_init / 2 * (1 + torch.cos(torch.tensor(torch.pi * t / T))) * 2.71828 ** (alpha * s)


@mistake("no score", "temperature", "The score is forgotten")
def _(t, T, rho, tau_init, s, alpha):
    return tau_init / 2 * (1 + torch.cos(torch.tensor(torch.pi * max(0, t / T - rho) / (1 - rho))))


@mistake("cools while compressing", "temperature", "hold tau at tau_init")
def _(t, T, rho, tau_init, s, alpha):
    share = torch.tensor((t - rho * T) / (T - rho * T))
    return tau_init / 2 * (1 + torch.cos(torch.pi * share)) * 2.718281828 ** (alpha * s)


@mistake("the gap the other way round", "gap", "That is what is left of the gap")
def _(ste, full, loss):
    return 1 - (ste - loss) / (ste - full)


@mistake("the normal distribution", "difference", "1.96 is for many seeds")
def _(a, b):
    d = a - b
    return torch.stack([d.mean(), 1.96 * d.std() / 5**0.5])


@mistake("unpaired", "difference", "Take the difference first")
def _(a, b):
    return torch.stack([a.mean() - b.mean(), 2.78 * ((a.var() + b.var()) / 5).sqrt()])


@mistake("from the left", "pack", "The first code belongs in the lowest bits")
def _(t):
    total = 0
    for code in t:
        total = 4 * total + int(code) + 2
    return total


@mistake("no scales", "bits", "The scales are forgotten")
def _(linear, rest, group):
    return (2 * linear + 16 * rest) / (linear + rest)


@pytest.mark.parametrize("what, name, function, said", MISTAKES, ids=[m[0] for m in MISTAKES])
def test_a_typical_mistake_gets_its_sentence(what, name, function, said):
    sentence = exercises.verdict(name, function)
    assert sentence.startswith("wrong at ") and said in sentence, sentence
    assert len(sentence) < 300 and "\n" not in sentence


@pytest.mark.parametrize("name", exercises.EXERCISES)
def test_every_sentence_is_reached(name):
    for sentence, slip in exercises.EXERCISES[name].slips.items():
        assert exercises.verdict(name, slip).endswith(f". {sentence}."), sentence


def test_what_is_no_answer_yet(capsys):
    def unfinished(w):
        raise NotImplementedError

    for stub in (lambda w: ..., lambda w: None, unfinished):
        exercises.check("quantize", stub)
        assert capsys.readouterr().out == "not yet\n"
    exercises.check("ste", lambda w: w[:2])
    assert "the result has shape (2,), expected (4,)" in capsys.readouterr().out
    exercises.check("quantize", lambda w: w.magic())
    assert "it raises AttributeError, 'Tensor' object has no" in capsys.readouterr().out
    with pytest.raises(ValueError, match="there is no exercise 'magic'; expected one of quantize"):
        exercises.check("magic", abs)


def test_the_readers_random_numbers_stay():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    exercises.verdict("hutchpp", exercises.sketched)
    assert torch.equal(torch.rand(1), expected)
