import pytest

from lepton.errors import InputError
from lepton.hf.configuration import LeptonHFConfig
from tests.hf.small import pair


def test_it_holds_the_shape_and_survives_its_file(tmp_path):
    model, wrapped = pair()
    wrapped.config.save_pretrained(tmp_path)
    read = LeptonHFConfig.from_pretrained(tmp_path)
    assert read.shape == wrapped.config.shape == model.config
    assert read.to_dict() == wrapped.config.to_dict() | {"transformers_version": read.transformers_version}


def test_names_of_transformers_follow_from_it():
    model, wrapped = pair()
    shape, config = model.config, wrapped.config
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    assert [getattr(config, name) for name in names] == [97, 32, 64, 4, 4]
    assert (config.num_key_value_heads, config.head_dim) == (shape.kv_heads, shape.head_dim)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (0, 0, None)
    with pytest.raises(AttributeError):
        config.hidden_size = 5
    assert LeptonHFConfig(lepton=shape.to_dict(), hidden_size=5).hidden_size == 32, "of another version's file"


def test_a_wrong_shape_is_said_with_the_field():
    fields = pair()[0].config.to_dict()
    with pytest.raises(InputError, match=r"heads=5 is not a multiple of kv_heads=2"):
        LeptonHFConfig(lepton=fields | {"heads": 5})
    with pytest.raises(InputError, match="did you mean 'window'"):
        LeptonHFConfig(lepton=fields | {"windw": 5})
    with pytest.raises(InputError, match="no shape: give LeptonHFConfig"):
        _ = LeptonHFConfig().vocab_size
