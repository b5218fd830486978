"""Diffusion models adapted from models of ``transformers``: weights, shift, attention, runs."""

from __future__ import annotations

import dataclasses
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("rich")
pytest.importorskip("datasets")
pytest.importorskip("tensorboard")
pytest.importorskip("transformers")

import transformers

from sedd.adapted import FAMILIES, AdaptedTransformer, visible_pairs
from sedd.config import ModelOptions, ParallelOptions, TrainConfig
from sedd.data.options import DataConfig
from sedd.diffusion import sample
from sedd.diffusion.schedule import get_schedule
from sedd.hub import SEDD, load_model, read_init
from sedd.hub.model import AdaptedSEDD
from sedd.training.run import Run
from sedd_ext import Absorbing

ROWS = 260
"""Tokens of the models: three more than there are bytes and end-of-text, as if padded."""
LENGTH = 16
SMALL: dict[str, Any] = {"num_attention_heads": 2, "num_hidden_layers": 2, "vocab_size": ROWS}
WIDE = {"intermediate_size": 32, "hidden_size": 16, "max_position_embeddings": 32}
CONFIGS: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_head": 2, "n_layer": 2, "n_positions": 32, "vocab_size": ROWS, "bos_token_id": 256},
    "llama": {**SMALL, **WIDE, "num_key_value_heads": 1, "bos_token_id": 1},
    "qwen2": {**SMALL, **WIDE, "num_key_value_heads": 1, "bos_token_id": None, "tie_word_embeddings": True},
    "bert": {**SMALL, **WIDE, "pad_token_id": 0},
    "modernbert": {**SMALL, **WIDE, "pad_token_id": 0, "local_attention": 8, "global_attn_every_n_layers": 2},
}
CAUSAL = [kind for kind, family in FAMILIES.items() if family.causal]
MASK = 257


@pytest.fixture(autouse=True)
def one_thread(threads: Callable[[int], None]) -> None:
    threads(1)


def make_model(kind: str, **changes: Any) -> Any:
    """A small model with random weights; the head's bias, which starts at 0, is random too."""
    torch.manual_seed(0)
    model_class = getattr(transformers, FAMILIES[kind].model)
    model = model_class(model_class.config_class(**{**CONFIGS[kind], **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return model


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., tuple[str, Any]]:
    def save(kind: str, **changes: Any) -> tuple[str, Any]:
        model = make_model(kind, **changes)
        model.save_pretrained(tmp_path / kind)
        return str(tmp_path / kind), model

    return save


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., TrainConfig]:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"the cat {i} sat on the mat {i * i}\n" for i in range(500)))

    def make(**changes: Any) -> TrainConfig:
        config = TrainConfig(
            run_dir=str(tmp_path / "run"),
            data=DataConfig(source=str(text), cache_dir=str(tmp_path / "cache")),
            model=ModelOptions(length=LENGTH),
            objective="md4",
            batch_size=4,
            steps=6,
            warmup=1,
            lr=1e-2,
            valid_blocks=4,
            valid_draws=2,
            valid_samples=0,
            checkpoint_every=2,
            valid_every=6,
            precision="fp32",
        )
        return dataclasses.replace(config, **changes)

    return make


def begin(config: TrainConfig) -> Run:
    return Run(config, load_init=read_init)


def network_of(run: Run) -> AdaptedTransformer:
    network = run.state.diffusion.network
    assert isinstance(network, AdaptedTransformer)
    return network.eval()


def causal(length: int) -> Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()


def texts() -> Tensor:
    return torch.randint(257, (3, LENGTH), generator=torch.Generator().manual_seed(1))


def logits(network: AdaptedTransformer, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.head(network.hidden(x, torch.ones(1)))


def metrics(run_dir: str) -> str:
    return Path(run_dir, "metrics.jsonl").read_text()


# -- the network is the checkpoint's -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CAUSAL)
def test_with_causal_attention_it_is_the_causal_model(
    kind: str, save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    path, model = save(kind)
    network = network_of(begin(make_config(init=path)))
    start = {"gpt2": 256, "llama": 1, "qwen2": MASK}[kind]
    x = texts()
    network.visible = causal(LENGTH + 1)
    found = logits(network, x)
    if start == MASK:  # the model has no such token: give it the row
        assert torch.allclose(network.trunk.embedding[MASK], model.get_input_embeddings().weight.mean(0))
        start = 259
        with torch.no_grad():
            model.get_input_embeddings().weight[start] = network.trunk.embedding[MASK]
    with torch.no_grad():
        wanted = model(torch.cat([torch.full((3, 1), start), x], 1)).logits
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[..., :MASK], wanted[:, :-1, :MASK], rtol=1e-4, atol=1e-5)
    network.visible = None
    assert not torch.allclose(logits(network, x), found, atol=1e-2), "attention is full"


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_it_is_the_masked_model_with_its_own_mask(
    kind: str, save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    path, model = save(kind)
    own = 7
    Path(path, "tokenizer.json").write_text(
        json.dumps(
            {
                "version": "1.0",
                "added_tokens": [
                    {
                        "id": own,
                        "content": "[MASK]",
                        "special": True,
                        "single_word": False,
                        "lstrip": False,
                        "rstrip": False,
                        "normalized": False,
                    }
                ],
                "model": {
                    "type": "WordLevel",
                    "vocab": {
                        **{f"w{i}": i for i in range(257) if i not in (own, 3, 4)},
                        "the": 3,
                        "[SEP]": 4,
                        "[MASK]": own,
                    },
                    "unk_token": "w0",
                },
                "pre_tokenizer": {"type": "Whitespace"},
            }
        )
    )
    run = begin(make_config(init=path))
    assert run.tokenizer.vocab_size == 257
    assert run.tokenizer.name.startswith("json-")
    assert run.config.tokenizer == f"{path}/tokenizer.json"
    run.train()
    again = Run(make_config(init=path, steps=8), load_init=read_init, resume=True)
    assert (again.state.step, again.tokenizer.name) == (6, run.tokenizer.name), "it resumes with the options it had"
    assert json.loads(Path(run.run_dir, "config.json").read_text())["tokenizer"] == f"{path}/tokenizer.json"
    run = begin(make_config(init=path, run_dir=str(run.run_dir) + "_2"))
    network, x = network_of(run), texts().masked_fill(texts() == own, 0)
    is_masked = torch.arange(LENGTH) % 3 == 0
    with torch.no_grad():
        wanted = model(x.masked_fill(is_masked, own)).logits
    found = logits(network, x.masked_fill(is_masked, MASK))
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[..., :MASK], wanted[..., :MASK], rtol=1e-4, atol=1e-5)


def test_every_parameter_gets_a_gradient(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    for kind in FAMILIES:
        config = make_config(init=save(kind)[0], run_dir=make_config().run_dir + kind)
        diffusion = begin(config).state.diffusion
        diffusion(texts(), torch.tensor([0.3, 0.6, 0.9])).sum().backward()
        for name, parameter in diffusion.named_parameters():
            assert parameter.grad is not None, (kind, name)
            assert bool(parameter.grad.any()), (kind, name)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_fused_and_plain_head_agree(
    kind: str, save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    run = begin(make_config(init=save(kind)[0]))
    diffusion, times = run.state.diffusion.eval(), torch.tensor([0.3, 0.6, 0.9])
    results = []
    for fused, again in ((True, False), (False, False), (True, True)):
        diffusion.train().zero_grad()
        diffusion.network.activation_checkpointing = again
        torch.manual_seed(4)  # dropout
        loss = diffusion(texts(), times, fused=fused, generator=torch.Generator().manual_seed(5))
        loss.sum().backward()
        results.append([loss, *(parameter.grad for parameter in diffusion.parameters())])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


def test_bfloat16(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    for kind in FAMILIES:
        config = make_config(init=save(kind)[0])
        runs = [
            begin(dataclasses.replace(config, run_dir=f"{config.run_dir}-{kind}-{precision}", precision=precision))
            for precision in ("fp32", "bf16")
        ]
        whole, half = (float(run.state.train_step()[0]) for run in runs)
        assert half == pytest.approx(whole, rel=0.02), kind


# -- attention ---------------------------------------------------------------------------------------------------------


def test_attention_grows_from_causal_to_full() -> None:
    def drawn(share: float, seed: int) -> Tensor:
        return visible_pairs(64, share, torch.Generator().manual_seed(seed))

    assert torch.equal(drawn(0.0, 1), causal(64))
    assert bool(drawn(1.0, 1).all())
    third = drawn(1 / 3, 1)
    assert bool((third | ~causal(64)).all()), "the past is always seen"
    assert third[~causal(64)].float().mean() == pytest.approx(1 / 3, abs=0.05)
    assert torch.equal(third, drawn(1 / 3, 1))
    assert not torch.equal(third, drawn(1 / 3, 2))


def test_the_steps_of_a_run_anneal(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    run = begin(make_config(init=save("gpt2")[0], init_anneal=4))
    network: Any = run.state.diffusion.network
    shares = []
    for _ in range(6):
        run.state.train_step()
        seen = network.visible
        shares.append(1.0 if seen is None else float(seen[~causal(LENGTH + 1)].float().mean()))
    assert shares[0] == 0
    assert shares[4:] == [1, 1]
    assert shares[1:4] == pytest.approx([1 / 4, 1 / 2, 3 / 4], abs=0.15)
    assert run.state.ema.network.visible is None, "evaluation sees everything"


def test_a_resumed_run_takes_the_same_steps(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    path, _ = save("gpt2")
    config = make_config(init=path, init_anneal=5)
    whole = begin(dataclasses.replace(config, run_dir=config.run_dir + "_whole"))
    whole.train()
    Run(dataclasses.replace(config, steps=3), load_init=read_init).train()
    for file in Path(path).iterdir():  # the run needs it no more
        file.unlink()
    resumed = Run(config, resume=True)
    assert resumed.state.step == 3
    resumed.train()
    for module in ("diffusion", "ema"):
        pairs = zip(
            getattr(whole.state, module).state_dict().items(),
            getattr(resumed.state, module).state_dict().items(),
            strict=True,
        )
        assert all(name == other and torch.equal(one, two) for (name, one), (other, two) in pairs)
    steps = [
        [line for line in metrics(run.config.run_dir).splitlines() if '"loss"' in line] for run in (whole, resumed)
    ]
    assert steps[0] == steps[1]
    assert len(steps[0]) == 6


# -- a run is one like any other ---------------------------------------------------------------------------------------


def test_a_run_loads_samples_and_starts_another(
    save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    from sedd.cli import main

    path, _ = save("gpt2")
    config = make_config(init=path, valid_samples=1)
    run = begin(config)
    run.train()
    assert run.best is not None
    loaded = load_model(config.run_dir)
    model = loaded.model
    assert isinstance(model, AdaptedTransformer)
    assert not model.training
    assert model.config.trunk["model_type"] == "gpt2"
    assert model.config.shift
    trained = run.state.ema.network.state_dict()
    assert all(torch.equal(value, trained[name]) for name, value in model.state_dict().items())
    x = texts()
    assert torch.equal(logits(model, x), logits(run.state.ema.network, x))
    tokens = sample(loaded.diffusion, batch=2, length=LENGTH, steps=4, generator=torch.Generator().manual_seed(0))
    assert tokens.shape == (2, LENGTH)
    assert int(tokens.max()) < MASK
    assert "2 blocks of width 16" in model.facts()

    for words in (
        ["sample", config.run_dir, "--steps", "4", "--num", "1"],
        ["infill", config.run_dir, "the {{4}} sat", "--steps", "4"],
        ["eval", "perplexity", config.run_dir, "--draws", "2", "--blocks", "4"],
        ["info", config.run_dir],
        ["report", config.run_dir, "--steps", "4"],
    ):
        assert main(words) == 0, words
    again = dataclasses.replace(config, init=config.run_dir, run_dir=config.run_dir + "_again")
    start = begin(again).state.diffusion.network.state_dict()
    assert all(torch.equal(start[name], value) for name, value in model.state_dict().items())


def test_the_same_network_with_random_weights(
    save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    first = begin(make_config(init=save("gpt2")[0]))
    config = dataclasses.replace(first.config, init=None, run_dir=first.config.run_dir + "_random")
    second = Run(config)
    mine, other = (run.state.diffusion.network.state_dict() for run in (first, second))
    assert [*mine] == [*other]
    assert not torch.equal(mine["trunk.body.wte.weight"], other["trunk.body.wte.weight"])


def test_sizes_and_options(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    path, _ = save("gpt2", n_positions=24, resid_pdrop=0.3)
    sizes = read_init(path).config
    assert (sizes.length, sizes.dropout, sizes.hidden_size, sizes.n_blocks) == (23, 0.3, 16, 2)
    assert read_init(save("bert")[0]).config.length == 32
    run = begin(make_config(init=path, model=ModelOptions(length=8, dropout=0.05, shift=False)))
    network = network_of(run)
    assert {module.p for module in network.modules() if isinstance(module, torch.nn.Dropout)} == {0.05}
    network.visible = causal(8)
    changed = texts()[:, :8].clone()
    before = logits(network, changed)
    changed[:, 3] += 1 - 2 * (changed[:, 3] > 100).long()
    moved = (logits(network, changed) - before).abs().amax((0, 2)) > 1e-6
    assert moved.tolist() == [False] * 3 + [True] * 5, "without the shift, a position reads its own state"


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("gpt2", {"objective": "score_entropy"}, r"objective: expected one that predicts .*gpt2, got score_entropy"),
        ("gpt2", {"objective": "genmd4"}, r"objective: expected one that .* one schedule for all tokens.*got genmd4"),
        ("gpt2", {"objective": "autoregressive"}, r"objective: expected one that predicts .*, got autoregressive"),
        ("gpt2", {"objective": "udlm", "process": "uniform"}, r"process: expected absorbing .*, got uniform"),
        ("gpt2", {"parallel": ParallelOptions(data="fsdp")}, r"parallel.data: expected ddp .*, got fsdp"),
        ("gpt2", {"parallel": ParallelOptions(vocab=2)}, r"parallel.vocab: expected 1 .*, got 2"),
        ("gpt2", {"model": ModelOptions(length=32)}, r"length: expected at most 31.*, got 32"),
        ("gpt2", {"model": ModelOptions(hidden_size=32)}, r"model.hidden_size: .* has 16, .* with 32"),
        ("gpt2", {"tokenizer": "gpt2"}, r"tokenizer: expected at most the 260 tokens .*, got 50257"),
        ("bert", {"init_anneal": 5}, r"init_anneal: expected 0 unless .*, got 5"),
        ("gpt2", {"init": None, "init_anneal": 5}, r"init_anneal: expected 0 unless .*, got 5"),
        ("gpt2", {"init": None, "model": ModelOptions(shift=True)}, r"model.shift: expected false unless .*, got true"),
    ],
)
def test_what_is_refused(
    kind: str, changes: dict[str, Any], message: str, save: Callable[..., Any], make_config: Callable[..., TrainConfig]
) -> None:
    path, _ = save(kind)
    with pytest.raises(ValueError, match=message):
        begin(make_config(**{"init": path, **changes}))


def test_sizes_beside_the_trunk_are_those_of_the_trunk(save: Callable[..., Any]) -> None:
    sizes = read_init(save("gpt2", resid_pdrop=0.3, attn_pdrop=0.1, embd_pdrop=0.0)[0]).config
    config = dataclasses.replace(sizes, length=8)
    dropouts = {module.p for module in AdaptedTransformer(config, MASK + 1).modules() if isinstance(module, nn.Dropout)}
    assert dropouts == {0.3, 0.1, 0.0}, "the model's own"
    for name, value in (("hidden_size", 32), ("n_blocks", 9), ("n_heads", 1), ("time_conditioning", True)):
        with pytest.raises(ValueError, match=f"{name}: expected .*, as in trunk, got {value}"):
            AdaptedTransformer(dataclasses.replace(config, **{name: value}), MASK + 1)  # type: ignore[arg-type]


def test_rows_that_nothing_names_are_refused(save: Callable[..., Any], make_config: Callable[..., TrainConfig]) -> None:
    path, _ = save("gpt2", vocab_size=600)
    with pytest.raises(
        ValueError, match=r"tokenizer: expected the tokeniser of the model in init, which has 600 tokens"
    ):
        begin(make_config(init=path))


def test_a_folder_with_the_name_of_a_tokeniser(
    save: Callable[..., Any], make_config: Callable[..., TrainConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, _ = save("gpt2")
    words = {"type": "WordLevel", "vocab": {**{f"w{i}": i for i in range(1, ROWS)}, "</s>": 0}, "unk_token": "w1"}
    described = {"version": "1.0", "model": words, "pre_tokenizer": {"type": "Whitespace"}}
    Path(path, "tokenizer.json").write_text(json.dumps(described))
    monkeypatch.chdir(tmp_path)
    run = begin(make_config(init="gpt2"))
    assert run.tokenizer.name.startswith("json-")
    assert run.config.tokenizer == "gpt2/tokenizer.json"


# -- a model folder ----------------------------------------------------------------------------------------------------


@pytest.fixture
def converted(
    save: Callable[..., Any], make_config: Callable[..., TrainConfig], tmp_path: Path
) -> Callable[..., tuple[SEDD, Path]]:
    from sedd.cli import main

    def convert(kind: str) -> tuple[SEDD, Path]:
        """The model of a run, and the folder that it was saved in."""
        config = make_config(init=save(kind)[0])
        begin(config).train()
        assert main(["convert", config.run_dir, str(tmp_path / "saved")]) == 0
        return SEDD.from_pretrained(config.run_dir), tmp_path / "saved"

    return convert


@pytest.mark.parametrize("kind", FAMILIES)
def test_a_saved_model_is_the_model(
    kind: str, converted: Callable[..., tuple[SEDD, Path]], make_config: Callable[..., TrainConfig]
) -> None:
    from sedd.cli import main

    model, folder = converted(kind)
    loaded = load_model(folder)
    network = loaded.model
    assert isinstance(network, AdaptedTransformer)
    assert isinstance(model, AdaptedTransformer)
    assert network.config == model.config
    assert loaded.tokenizer.name == "bytes"
    weights = model.state_dict()
    assert [*network.state_dict()] == [*weights]
    assert all(torch.equal(value, weights[name]) for name, value in network.state_dict().items())
    assert torch.equal(logits(network, texts()), logits(model, texts()))
    assert main(["sample", str(folder), "--steps", "4", "--num", "1"]) == 0

    second = begin(make_config(init=str(folder), run_dir=str(folder) + "_run"))
    start = second.state.diffusion.network.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in start.items())

    assert not (folder / "modeling_sedd.py").exists()
    assert "auto_map" not in (folder / "config.json").read_text()
    card = (folder / "README.md").read_text()
    assert f"({kind}: 2 blocks of width 16, 2 heads)" in card
    assert "With `transformers` and the package `sedd_ext`" in card
    assert "AutoModel" not in card
    network.save_pretrained(folder.with_name("again"))
    for name in ("config.json", "README.md"):
        assert (folder.with_name("again") / name).read_bytes() == (folder / name).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.trunk.model_type": "t5"}, "model_type: expected one of gpt2, .* got 't5'"),
        ({"model.trunk": {"n_layer": 2}}, "model_type: expected one of gpt2, .* got 'None'"),
        ({"model.trunk": "gpt2"}, "model.trunk: expected dict, got 'gpt2'"),
        ({"model.trunk.auto_map": {"AutoModel": "code.Model"}}, "trunk.auto_map: expected an entry of GPT2Config"),
        (
            {"model.trunk.n_layer": 3},
            "safetensors: invalid configuration: n_blocks: expected 3, as in trunk, got 2",
        ),
        ({"model.trunk.n_inner": 32}, r"expected the tensors .*misshapen \(trunk.body.h.0.mlp.c_fc.weight"),
        # 64 terabytes: nothing is allocated before the tensors are compared
        (
            {"model.trunk.n_inner": 10**12},
            r"misshapen \(trunk.body.h.0.mlp.c_fc.weight \[16, 64\] instead of \[16, 1000",
        ),
        (
            {"model.trunk.n_layer": 1000, "model.n_blocks": 1000},
            "model.n_blocks: expected at most .*, one per tensor, got 1000",
        ),
        ({"model.trunk": {}, "model.shift": True}, "expected those of a SEDD"),
        ({"tokens": None}, "tokens: expected the size of the vocabulary without MASK, got None"),
        ({"tokens": True}, "tokens: expected the size of the vocabulary without MASK, got True"),
        ({"tokens": 300, "tokenizer": None}, r"expected the tensors .*misshapen \(trunk.body.wte.weight"),
        ({"graph.type": "uniform"}, "process: expected absorbing for a network adapted from gpt2, got uniform"),
        ({"objective": "score_entropy"}, "objective: expected one that predicts the clean token .*gpt2, got score"),
        ({"objective": "genmd4"}, "objective: expected one that predicts the clean token .*gpt2, got genmd4"),
    ],
)
def test_a_changed_config_is_refused(
    changes: dict[str, Any], message: str, save: Callable[..., Any], tmp_path: Path
) -> None:
    sizes = read_init(save("gpt2")[0]).config
    AdaptedSEDD(sizes, Absorbing(257), get_schedule("loglinear"), "bytes", "md4").save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    SEDD.from_pretrained(file.parent)
    config = json.loads(file.read_text())
    for name, value in changes.items():
        *path, last = name.split(".")
        section = config
        for part in path:
            section = section[part]
        section[last] = value
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        SEDD.from_pretrained(file.parent)


def test_a_network_of_this_package_is_not_adapted(tmp_path: Path) -> None:
    SEDD("tiny", Absorbing(256), schedule=get_schedule("loglinear")).save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    saved = file.read_text()
    for changes, message in (
        ({"shift": True}, "model.shift: expected false for a network of this package, got true"),
        ({"trunk": {"model_type": "gpt2"}}, "objective: expected one that predicts the clean token"),
    ):
        changed = json.loads(saved)
        changed["model"].update(changes)
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            SEDD.from_pretrained(tmp_path / "saved")


# -- files that are not trusted ----------------------------------------------------------------------------------------


def test_weights_in_several_files(save: Callable[..., Any]) -> None:
    path, model = save("llama")
    wanted = read_init(path).tensors
    Path(path, "model.safetensors").unlink()
    model.save_pretrained(path, max_shard_size="5KB")
    assert len([*Path(path).glob("model-*.safetensors")]) > 1
    found = read_init(path).tensors
    assert [*found] == [*wanted]
    assert all(map(torch.equal, found.values(), wanted.values()))


def test_a_pickle_is_read_without_code(save: Callable[..., Any], tmp_path: Path) -> None:
    path, model = save("gpt2")
    wanted = read_init(path).tensors
    Path(path, "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors or pytorch_model.bin"):
        read_init(path)
    torch.save(model.state_dict(), Path(path, "pytorch_model.bin"))
    found = read_init(path).tensors
    assert [*found] == [*wanted]
    assert all(map(torch.equal, found.values(), wanted.values()))

    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (tmp_path / "ran",)

    with open(Path(path, "pytorch_model.bin"), "wb") as file:
        pickle.dump({"wte.weight": Evil()}, file, protocol=2)
    with pytest.raises(ValueError, match=r"no code was executed|damaged"):
        read_init(path)
    assert not (tmp_path / "ran").exists()


def test_a_configuration_cannot_name_code(save: Callable[..., Any], tmp_path: Path) -> None:
    path, _ = save("gpt2")
    wanted = read_init(path)
    file = Path(path, "config.json")
    given = json.loads(file.read_text())
    Path(path, "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    file.write_text(
        json.dumps(
            {
                **given,
                "auto_map": {"AutoModelForCausalLM": "evil.Model"},
                "attn_implementation": "someone/kernel",
                "_attn_implementation": "someone/kernel",
                "quantization_config": {"quant_method": "gptq", "bits": 4},
                "architectures": ["Evil"],
                "is_decoder": True,
            }
        )
    )
    found = read_init(path)
    assert found.config == wanted.config
    assert not (tmp_path / "ran").exists()
    network = AdaptedTransformer(found.config, ROWS)
    assert network.trunk.body.config._attn_implementation == "sdpa"
    for changed, message in (
        ({**given, "model_type": "opt"}, r"init: .*model_type: expected one of gpt2, llama, .* got 'opt'"),
        ({**given, "n_head": 3}, r"expected|divisible"),
        ({**given, "activation_function": "evil"}, r"expected"),
    ):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            begin_of(path)


def begin_of(path: str) -> AdaptedTransformer:
    return AdaptedTransformer(read_init(path).config, ROWS)


def test_weights_that_do_not_fit(save: Callable[..., Any]) -> None:
    path, model = save("bert")
    model.bert.save_pretrained(path)  # no head
    with pytest.raises(ValueError, match=r"expected the weights of BertForMaskedLM, got none for cls"):
        read_init(path)
    path, _ = save("gpt2")
    file = Path(path, "config.json")
    file.write_text(json.dumps({**json.loads(file.read_text()), "n_embd": 8}))
    with pytest.raises(ValueError, match=r"expected the weights of its config.json"):
        read_init(path)
    sizes = read_init(save("llama")[0]).config
    for trunk, message in (
        ({**sizes.trunk, "auto_map": {}}, r"trunk.auto_map: expected an entry of LlamaConfig"),
        ({**sizes.trunk, "model_type": "opt"}, r"model_type: expected one of"),
        ({**sizes.trunk, "hidden_size": "many"}, r"trunk: expected a configuration of llama"),
    ):
        with pytest.raises(ValueError, match=message):
            AdaptedTransformer(dataclasses.replace(sizes, trunk=trunk), ROWS)
