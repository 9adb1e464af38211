"""The reasoning tasks and their sizes: reasoning-gym's name of a task -> its settings by level, easiest first."""

from __future__ import annotations

from typing import Any

Settings = dict[str, Any]

ARITHMETIC: dict[str, tuple[Settings, ...]] = {
    "chain_sum": (
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
        {"min_terms": 2, "max_terms": 4, "min_digits": 2, "max_digits": 3},
        {"min_terms": 3, "max_terms": 6, "min_digits": 2, "max_digits": 4},
    ),
    "products": (
        {"min_digits": 1, "max_digits": 1, "max_terms": 3},
        {"min_digits": 2, "max_digits": 2},
        {"min_digits": 3, "max_digits": 3},
    ),
    "basic_arithmetic": (
        {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2, "operators": ("+", "-", "+", "-", "*", "/")},
        {"min_terms": 3, "max_terms": 5, "min_digits": 1, "max_digits": 2, "operators": ("+", "-", "+", "-", "*", "/")},
    ),
    "gcd": ({"max_value": 60}, {"max_value": 300}, {"max_value": 1000}),
    "lcm": ({"max_value": 30}, {"max_value": 60}, {"max_value": 120}),
    "fraction_simplification": (
        {"max_value": 20, "max_factor": 10},
        {"max_value": 50, "max_factor": 20},
        {"max_value": 100, "max_factor": 50},
    ),
    "prime_factorization": ({"max_value": 300}, {"max_value": 1000}, {"max_value": 3000}),
    "leg_counting": (
        {"min_animals": 2, "max_animals": 3, "max_instances": 5},
        {"min_animals": 3, "max_animals": 5, "max_instances": 10},
        {"min_animals": 4, "max_animals": 8, "max_instances": 15},
    ),
    "simple_equations": (
        {"min_terms": 2, "max_terms": 2, "max_value": 10},
        {"min_terms": 2, "max_terms": 3, "max_value": 20},
        {"min_terms": 2, "max_terms": 4, "max_value": 30, "operators_weights": (0.45, 0.45, 0.1)},
    ),
}

WORDS: dict[str, tuple[Settings, ...]] = {
    "number_sorting": (
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0},
        {"min_numbers": 3, "max_numbers": 6, "max_decimals": 1},
        {"min_numbers": 4, "max_numbers": 8, "max_decimals": 2},
    ),
    "number_filtering": (
        {"min_numbers": 3, "max_numbers": 4, "max_decimals": 0},
        {"min_numbers": 3, "max_numbers": 6, "max_decimals": 1},
        {"min_numbers": 4, "max_numbers": 8, "max_decimals": 2},
    ),
    "spell_backward": (
        {"min_word_len": 3, "max_word_len": 4},
        {"min_word_len": 4, "max_word_len": 7},
        {"min_word_len": 6, "max_word_len": 10},
    ),
    "letter_counting": (
        {"min_words": 2, "max_words": 3},
        {"min_words": 3, "max_words": 6},
        {"min_words": 5, "max_words": 10},
    ),
    "caesar_cipher": (
        {"delimiter": " ", "min_words": 2, "max_words": 3, "max_rotation": 3},
        {"delimiter": ",", "min_words": 2, "max_words": 4, "max_rotation": 6},
        {"delimiter": "\n", "min_words": 3, "max_words": 5, "max_rotation": 12},
    ),
    "word_sorting": (
        {"min_words": 3, "max_words": 3, "max_word_length": 8},
        {"min_words": 4, "max_words": 5, "max_word_length": 8},
        {"min_words": 5, "max_words": 7, "max_word_length": 8},
    ),
    "knights_knaves": (
        {"n_people": 2, "depth_constraint": 2, "width_constraint": 2},
        {"n_people": 2, "depth_constraint": 2, "width_constraint": 3},
        {"n_people": 3, "depth_constraint": 2, "width_constraint": 2},
    ),
    # The package calls "All A are B, some B are (not) C, so some A are (not) C" valid: no level has All beside Some.
    "syllogism": (
        {"allow_some": False, "allow_some_not": False, "inversion_probability": 1.0, "invalid_ratio": 0.5},
        {"allow_some": False, "allow_some_not": False, "invalid_ratio": 0.5},
        {"allow_all": False, "invalid_ratio": 0.5},
    ),
    "countdown": (
        {
            "min_numbers": 3,
            "max_numbers": 3,
            "max_value": 20,
            "min_target": 1,
            "max_target": 100,
            "operators": ("+", "-"),
        },
        {"min_numbers": 3, "max_numbers": 3, "max_value": 12, "min_target": 1, "max_target": 100},
        {
            "min_numbers": 4,
            "max_numbers": 4,
            "max_value": 20,
            "min_target": 1,
            "max_target": 100,
            "operators": ("+", "-"),
        },
    ),
}

LEVELS = ARITHMETIC | WORDS
