"""The model on disk: what is read, and that every broken folder is refused with its reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from frontend.model_files import check_weights, find_model, read_card, served_name
from ipc.errors import ConfigError, ModelError
from tests.frontend.model_folder import CONTEXT_TOKENS, VOCAB_SIZE, write_config, write_safetensors


def card_of(folder: Path, max_model_len: int | None = None):
    return read_card(folder, name="m", max_model_len=max_model_len, max_logprobs=20)


def test_card_of_a_plain_model(tmp_path):
    write_config(tmp_path)
    card = card_of(tmp_path)
    assert (card.vocab_size, card.max_model_len, card.eos_token_ids) == (VOCAB_SIZE, CONTEXT_TOKENS, (0,))
    assert card.path == str(tmp_path)


def test_eos_ids_of_both_files_without_duplicates_or_strangers(tmp_path):
    write_config(tmp_path, eos_token_id=[1, 7])
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 3, VOCAB_SIZE + 5]}))
    assert card_of(tmp_path).eos_token_ids == (7, 3, 1)


def test_a_model_without_eos(tmp_path):
    write_config(tmp_path, eos_token_id=None)
    assert card_of(tmp_path).eos_token_ids == ()


def test_text_config_of_a_multimodal_model(tmp_path):
    text = {"vocab_size": 99, "max_position_embeddings": 77, "eos_token_id": 5}
    write_config(tmp_path, text_config=text)
    card = card_of(tmp_path)
    assert (card.vocab_size, card.max_model_len, card.eos_token_ids) == (99, 77, (5,))


def test_what_a_nested_config_leaves_out_is_its_class_s_default(tmp_path):
    """As those of Gemma 3 do on the hub."""
    config = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106]}
    config["text_config"] = {"model_type": "gemma3_text", "hidden_size": 64, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    card = card_of(tmp_path)
    assert (card.vocab_size, card.max_model_len, card.eos_token_ids) == (262_208, 131_072, (1, 106))


@pytest.mark.parametrize("nested", [[1], "s", 3])
def test_a_nested_config_that_is_none_is_no_traceback(tmp_path, nested):
    write_config(tmp_path, text_config=nested)
    assert card_of(tmp_path).vocab_size == VOCAB_SIZE


def test_max_model_len_lowers_but_never_raises(tmp_path):
    write_config(tmp_path)
    assert card_of(tmp_path, 100).max_model_len == 100
    with pytest.raises(ConfigError, match=f"{CONTEXT_TOKENS + 1} tokens.*{CONTEXT_TOKENS}") as caught:
        card_of(tmp_path, CONTEXT_TOKENS + 1)
    assert caught.value.param == "--max-model-len"


def test_a_model_that_states_no_context_needs_the_flag(tmp_path):
    write_config(tmp_path, max_position_embeddings=None)
    with pytest.raises(ConfigError, match="states no context"):
        card_of(tmp_path)
    assert card_of(tmp_path, 64).max_model_len == 64


@pytest.mark.parametrize("text", ["", "{", "[]", "[" * 100_000, '{"vocab_size": "many"}', '{"vocab_size": 0}'])
def test_unusable_config_json(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json"):
        card_of(tmp_path)


def test_missing_config_json(tmp_path):
    with pytest.raises(ModelError, match=r"has no config\.json"):
        card_of(tmp_path)


def test_whole_weights_pass(tmp_path):
    one, two = write_safetensors(tmp_path / "a.safetensors", 8), write_safetensors(tmp_path / "b.safetensors", 0)
    assert check_weights(tmp_path) == one.stat().st_size + two.stat().st_size


@pytest.mark.parametrize("keep", [0, 5, 20, -1])
def test_truncated_weights_name_the_file_and_both_sizes(tmp_path, keep):
    path = write_safetensors(tmp_path / "model.safetensors", 1000)
    whole = path.read_bytes()
    path.write_bytes(whole[:keep])
    with pytest.raises(ModelError, match="is truncated") as caught:
        check_weights(tmp_path)
    assert "model.safetensors" in str(caught.value)
    assert str(len(whole[:keep])) in str(caught.value)
    if keep == -1:
        assert f"expected {len(whole)} bytes, found {len(whole) - 1}" in str(caught.value)


def test_surplus_bytes_are_damage(tmp_path):
    path = write_safetensors(tmp_path / "model.safetensors")
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ModelError, match="is damaged"):
        check_weights(tmp_path)


@pytest.mark.parametrize("content", [b"\xff" * 64, b"\x04" + bytes(7) + b"nope", b"\x02" + bytes(7) + b"[]"])
def test_files_that_are_no_safetensors(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelError, match="safetensors"):
        check_weights(tmp_path)


def test_lfs_pointer(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(ModelError, match="git lfs pull"):
        check_weights(tmp_path)


def test_index_names_a_missing_shard(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ModelError, match=r"lacks model-2\.safetensors"):
        check_weights(tmp_path)
    write_safetensors(tmp_path / "model-2.safetensors")
    assert check_weights(tmp_path) > 0


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x02.")
    with pytest.raises(ModelError, match="pickled weights runs code"):
        check_weights(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(ModelError, match="no safetensors"):
        check_weights(tmp_path)


def test_a_folder_is_found_and_named(tmp_path):
    folder = tmp_path / "my-model"
    folder.mkdir()
    assert find_model(str(folder)) == folder.resolve()
    assert served_name(str(folder)) == "my-model"
    assert served_name("org/name") == "org/name"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nope", "a/b/c", "~nobody/x"])
def test_paths_that_are_no_folder_do_not_reach_the_hub(name):
    with pytest.raises(ModelError, match="no such folder") as caught:
        find_model(name)
    assert caught.value.param == "--model"


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "x.gguf").write_bytes(b"")
    with pytest.raises(ModelError, match="is a file"):
        find_model(str(tmp_path / "x.gguf"))


def test_malformed_hub_id():
    with pytest.raises(ModelError, match="well-formed hub id"):
        find_model("not a model!")


@pytest.mark.parametrize(
    ("raised", "said"),
    [
        ("RepositoryNotFoundError", "nor a model on the hub"),
        ("GatedRepoError", "is gated"),
        ("LocalEntryNotFoundError", "cannot be reached"),
    ],
)
def test_hub_errors_become_one_typed_error(monkeypatch, raised, said):
    import huggingface_hub
    from huggingface_hub import errors

    def download(*_args, **_kwargs):
        kind = getattr(errors, raised)
        raise kind.__new__(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelError, match=said):
        find_model("org/name")
