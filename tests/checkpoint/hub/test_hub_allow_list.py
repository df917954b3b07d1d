"""What may leave the machine."""

import pickle

import pytest

from neox_hf.checkpoint.hub import HubPublisher
from neox_hf.checkpoint.hub.allow_list import allowed_files, check_contents, is_allowed, secrets_of_environment
from neox_hf.checkpoint.hub.faults import Rejected

TOKEN_IN_A_FILE = "hf_" + "SomebodysToken" * 3


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "adapter_model.safetensors",
        "adapter_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "chat_template.jinja",
        "README.md",
        "recipe.yaml",
        "loss_curve.png",
    ],
)
def test_a_model_repository_is_allowed(name):
    assert is_allowed(name)


@pytest.mark.parametrize(
    "name",
    [
        "training_args.bin",
        "pytorch_model.bin",
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "manifest.json",
        "rng_state.pth",
        ".env",
        "run.log",
        "quarantine.jsonl",
        "modeling.py",
    ],
)
def test_everything_else_is_not(name):
    assert not is_allowed(name)


def test_folders_and_links_are_never_taken(tmp_path):
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "rank0.safetensors").touch()
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "README.md").symlink_to(tmp_path / "secret")
    (tmp_path / "config.json").write_text("{}")
    assert [path.name for path in allowed_files(tmp_path)] == ["config.json"]


def test_a_token_in_a_file_is_found_and_not_repeated(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"hub:\n  push: true\n  token: {TOKEN_IN_A_FILE}\n")
    with pytest.raises(Rejected, match=r"recipe\.yaml:3 holds an access token or another secret; remove it") as caught:
        check_contents([recipe], [])
    assert TOKEN_IN_A_FILE not in str(caught.value)


def test_secrets_of_the_environment_are_found_whatever_their_form(tmp_path):
    environment = {"WANDB_API_KEY": "0123456789abcdef0123", "HOME": "/home/somebody-somewhere", "A_TOKEN": "short"}
    secrets = secrets_of_environment(environment)
    assert secrets == ["0123456789abcdef0123"]
    card = tmp_path / "README.md"
    card.write_text("key 0123456789abcdef0123")
    with pytest.raises(Rejected, match=r"README\.md:1 holds"):
        check_contents([card], secrets)
    card.write_text("/home/somebody-somewhere, hf_short")
    check_contents([card], secrets)


def test_a_pickle_that_calls_itself_safetensors_is_refused(tmp_path):
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(pickle.dumps({"weights": [1.0] * 100}))
    with pytest.raises(Rejected, match=r"model\.safetensors is not a whole safetensors file"):
        check_contents([weights], [])


def test_truncated_weights_are_refused(checkpoint):
    weights = checkpoint(1) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    with pytest.raises(Rejected, match="is not a whole safetensors file"):
        check_contents([weights], [])


def test_a_checkpoint_with_a_token_in_it_is_not_pushed_and_the_next_one_is(hub, settings, checkpoint, tmp_path):
    publisher = HubPublisher(settings, tmp_path)
    leaking = checkpoint(1)
    (leaking / "config.json").write_text(f'{{"note": "{hub.token}"}}')
    publisher.publish_step(leaking, 1)
    publisher.publish_step(checkpoint(2), 2)
    report = publisher.close(60)
    assert report.pushed == ["step2"]
    ((revision, reason),) = report.pending
    assert revision == "step1"
    assert "config.json:1 holds an access token" in reason
    assert not any("step1" in request for request in hub.requests)
