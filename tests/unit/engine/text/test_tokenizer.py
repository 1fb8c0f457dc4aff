"""The tokenizer must agree with transformers on text, chat and ids, and name the broken file when it cannot load."""

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.config import ConfigError
from engine.text.tokenizer import Tokenizer, load_tokenizer
from engine.types import InvalidRequestError
from tests.models import DEMO_MODEL

TEXTS = (
    "Hello world's 1234  \n\n x",
    "héllo é e\u0301 😀👩‍👩‍👧 中文 ð\x00",
    "<|im_start|>user\nhi<|im_end|>\n",
    "  lead\tand tail  \r\n",
    "",
)
CHAT = (
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Grüße 😀"},
    {"role": "assistant", "content": ""},
)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer(DEMO_MODEL)


@pytest.fixture(scope="module")
def reference():
    transformers = pytest.importorskip("transformers")
    return transformers.AutoTokenizer.from_pretrained(DEMO_MODEL)


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    return Path(shutil.copytree(DEMO_MODEL, tmp_path / "model"))


def edit_json(file: Path, **changes: object) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("text", TEXTS)
def test_agrees_with_transformers(tokenizer, reference, text):
    ids = tokenizer.encode(text)
    assert ids == reference(text).input_ids
    for skip in (True, False):
        assert tokenizer.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_chat_agrees_with_transformers(tokenizer, reference, add_generation_prompt):
    expected = reference.apply_chat_template(CHAT, add_generation_prompt=add_generation_prompt, tokenize=False)
    assert tokenizer.apply_chat_template(CHAT, add_generation_prompt) == expected


def test_transformers_reads_the_demo_model_as_specified():
    transformers = pytest.importorskip("transformers")
    config = transformers.AutoConfig.from_pretrained(DEMO_MODEL)
    assert type(config).__name__ == "Qwen2MoeConfig"
    assert (config.num_experts, config.num_experts_per_tok, config.norm_topk_prob) == (60, 4, False)
    assert config.mlp_only_layers == []
    assert config.rope_parameters["rope_theta"] == 1e6


def test_ids_of_the_demo_model(tokenizer):
    assert tokenizer.vocab_size == 4096
    assert tokenizer.eos_token_ids == {4093, 4095}
    assert tokenizer.token_text(4094) == "<|im_start|>"
    assert tokenizer.is_special(4094)
    assert not tokenizer.is_special(0)


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, derandomize=True)
def test_token_bytes_join_to_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode("utf-8")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)


@given(ids=st.lists(st.integers(0, 4095)))
@settings(deadline=None, derandomize=True)
def test_token_bytes_join_to_the_decoded_text_for_any_ids(tokenizer, ids):
    joined = b"".join(tokenizer.token_bytes(i) for i in ids).decode("utf-8", errors="replace")
    assert joined == tokenizer.decode(ids, skip_special_tokens=False)


def test_an_id_without_a_token_adds_nothing(tokenizer):
    assert tokenizer.token_bytes(5000) == b""
    assert tokenizer.decode([5000]) == ""


def test_part_of_a_character_is_replaced_in_text_only(tokenizer):
    token_id = tokenizer.encode("😀")[0]
    assert tokenizer.token_bytes(token_id)[:1] == b"\xf0"
    assert tokenizer.token_text(token_id) == "\ufffd"


def test_a_lone_surrogate_is_the_clients_error(tokenizer):
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.encode("a\ud800b")
    assert caught.value.param == "prompt"
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.apply_chat_template([{"role": "user", "content": "\ud800"}])
    assert caught.value.param == "messages"


@pytest.mark.parametrize("messages", [[{"role": "user"}], [{"role": "user", "content": None}], ["text"], 3])
def test_messages_that_do_not_fit_the_template(tokenizer, messages):
    with pytest.raises(InvalidRequestError) as caught:
        tokenizer.apply_chat_template(messages)
    assert caught.value.param == "messages"


def test_template_dialect(model_dir):
    template = """
    {%- for message in messages %}
        {%- if message.role == 'system' %}
            {{- raise_exception('no system role: ' + message|tojson) }}
        {%- endif %}
        {% if loop.index > 1 %}
            {% break %}
        {% endif %}
{{ message.content }}{{ eos_token }}
    {% endfor %}"""
    (model_dir / "chat_template.jinja").write_text(template)
    tokenizer = load_tokenizer(model_dir)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "a"}] * 2) == "a<|im_end|>\n"
    with pytest.raises(InvalidRequestError, match=r'no system role: \{"role": "system", "content": "é"\}'):
        tokenizer.apply_chat_template([{"role": "system", "content": "é"}])


def test_a_template_cannot_leave_its_sandbox(model_dir):
    (model_dir / "chat_template.jinja").write_text("{{ messages.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(InvalidRequestError):
        load_tokenizer(model_dir).apply_chat_template([])


def test_chatml_without_a_template(model_dir, tokenizer):
    edit_json(model_dir / "tokenizer_config.json", chat_template=None)
    assert load_tokenizer(model_dir).apply_chat_template(CHAT) == tokenizer.apply_chat_template(CHAT)


def test_the_default_of_several_templates(model_dir):
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    edit_json(model_dir / "tokenizer_config.json", chat_template=named)
    assert load_tokenizer(model_dir).apply_chat_template(CHAT) == "plain"


def test_eos_falls_back_to_config_json_and_the_tokenizers_own(model_dir):
    (model_dir / "generation_config.json").unlink()
    edit_json(model_dir / "config.json", eos_token_id=7)
    assert load_tokenizer(model_dir).eos_token_ids == {7, 4095}


def test_truncation_and_padding_of_the_file_are_ignored(model_dir, tokenizer):
    file = str(model_dir / "tokenizer.json")
    backend = tokenizers.Tokenizer.from_file(file)
    backend.enable_truncation(4)
    backend.enable_padding(length=4)
    backend.save(file)
    for text in ("a", "one two three four five six seven eight"):
        assert load_tokenizer(model_dir).encode(text) == tokenizer.encode(text)


def test_byte_fallback_pieces(model_dir):
    vocab = {"<unk>": 0, "▁": 1, "a": 2, "▁a": 3} | {f"<0x{byte:02X}>": 4 + byte for byte in range(256)}
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE(vocab=vocab, merges=[("▁", "a")], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = tokenizers.decoders.Sequence(
        [tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(), tokenizers.decoders.Fuse()]
    )
    backend.save(str(model_dir / "tokenizer.json"))
    tokenizer = load_tokenizer(model_dir)
    ids = tokenizer.encode("a▁a😀")
    assert b"".join(tokenizer.token_bytes(i) for i in ids).decode() == "a a😀" == tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("tokenizer.json", None, "does not exist"),
        ("tokenizer.json", b"{", "cannot be read as JSON"),
        ("tokenizer.json", b"\xff\xfe", "cannot be read as JSON"),
        ("tokenizer.json", b"[]", "must hold a JSON object"),
        ("tokenizer.json", b"{}", "is not a valid tokenizer"),
        ("tokenizer_config.json", b"{", "cannot be read as JSON"),
        ("tokenizer_config.json", b'{"chat_template": "{% if %}"}', "chat template does not compile"),
        ("tokenizer_config.json", b'{"chat_template": 3}', "chat template does not compile"),
        ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x'"),
        ("chat_template.jinja", b"{{", "chat template does not compile"),
        ("chat_template.jinja", b"\xff", "cannot be read as text"),
    ],
)
def test_broken_files_are_named_in_one_sentence(model_dir, name, content, words):
    file = model_dir / name
    if content is None:
        file.unlink()
    else:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_tokenizer(model_dir)
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_decoder_is_refused(model_dir):
    backend = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.save(str(model_dir / "tokenizer.json"))
    with pytest.raises(ConfigError, match="decoder is 'WordPiece'"):
        load_tokenizer(model_dir)
