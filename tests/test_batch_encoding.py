"""What a tokenizer pads into is a mapping and no dictionary: it trains like one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from assertions import assert_same_bits
from methods_by_name import options
from training import Rows, image_rows, train, vit, weights
from transformers import BatchEncoding


def as_dictionary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    return {name: torch.stack([torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}


def as_encoding(rows: list[dict[str, Any]]) -> BatchEncoding:
    return BatchEncoding(as_dictionary(rows))


@pytest.mark.parametrize("name", ["sage", "sam", "coral"])
def test_an_encoding_trains_like_a_dictionary(name):
    plain, encoded = (
        train(vit(), Rows(image_rows()), data_collator=collator, remove_unused_columns=False, **options(name))
        for collator in (as_dictionary, as_encoding)
    )
    assert_same_bits(weights(encoded.model), weights(plain.model), name)
