"""clip_vocabulary.py: the real tokenizer of Stable Diffusion, against OpenCLIP's and transformers', in many scripts."""

import dataclasses
import hashlib
import json
import threading

import numpy as np
import pytest
from safetensors.numpy import save_file
from transformers import CLIPTokenizer

from tests import original_file, tiny
from tiue_jax.convert.import_single_file import import_single_file
from tiue_jax.models.presets import PRESETS, Configs
from tiue_jax.models.tokenizer import Tokenizer
from tiue_jax.schedule import Schedule
from tiue_jax.weights import clip_vocabulary, hub

# Prompts, and their ids by open_clip_torch 3.3.0's SimpleTokenizer, without the first and the last one. It agrees with
# transformers but for what it cleans before: HTML entities, and what ftfy mends, such as full-width forms and quotes.
PROMPTS = {
    "Latin": (
        "a photo of a cat",
        "320 1125 539 320 2368",
    ),
    "Latin with accents": (
        "Café crème à Besançon, naïve façade — São Tomé, Łódź, Žižkov, smørrebrød",
        "15304 1075 12138 614 21259 571 1489 10067 525 267 1097 35689 563 778 10067 1928 2005 45911 999 4166 "
        "267 40419 8891 67 129 374 267 129 122 72 129 122 15156 267 978 17483 81 515 711 17483 323",
    ),
    "Vietnamese": (
        "một con mèo trên ghế sô pha",
        "76 157 119 247 339 2457 76 12138 334 635 27515 333 583 157 118 379 82 127 368 26255",
    ),
    "Cyrillic": (
        "красная кошка на синем диване, подъезд, ёлка",
        "27152 16370 16912 23669 22705 16912 141 493 27152 13506 141 230 27152 27080 22705 27080 23669 16701 "
        "22705 22176 140 376 140 112 29503 110 16912 22705 140 369 267 26302 38416 141 232 22176 140 115 140 "
        "368 267 141 239 47611 27152 27080",
    ),
    "Greek": (
        "Μια κόκκινη γάτα πάνω στον καναπέ, Ὀδυσσεύς",
        "138 120 138 117 138 365 138 118 139 234 138 118 138 118 138 117 138 121 138 371 138 111 138 105 139 "
        "226 138 365 139 222 138 105 138 121 38065 139 225 139 226 138 123 138 377 138 118 138 109 138 121 "
        "138 109 139 222 138 511 267 157 121 222 138 112 139 227 139 225 139 225 138 113 139 235 139 480",
    ),
    "Arabic": (
        "قطة حمراء على أريكة زرقاء، صورة",
        "27585 32050 20915 25722 12986 10948 13189 350 18843 14251 149 487 148 96 43273 33499 20915 36169 "
        "10948 27585 13189 350 148 490 27271 48242 20915",
    ),
    "Hebrew": (
        "חתול אדום על ספה כחולה, שָׁלוֹם",
        "147 245 147 103 147 243 147 506 147 238 147 241 147 243 147 507 147 95 147 506 147 94 147 97 147 498 "
        "147 249 147 245 147 243 147 250 147 498 267 147 358 146 116 147 479 147 250 147 499 146 373 147 507",
    ),
    "Devanagari": (
        "नीले सोफे पर लाल बिल्ली की तस्वीर",
        "26090 25751 30881 25130 28505 34452 3124 360 25130 3124 103 19052 30881 13343 30881 43599 26721 "
        "30881 19389 30881 25751 22067 25751 3124 97 28505 19389 39545 25751 19052",
    ),
    "Thai": (
        "แมวสีแดงบนโซฟาสีน้ำเงิน",
        "23916 94 26990 35737 20278 23916 242 24603 33859 17474 33118 1777 233 1777 253 12330 359 20278 17639 "
        "13123 1777 111 14076 485 17092 17639",
    ),
    "Han": (
        "一只红色的猫坐在蓝色沙发上",
        "19759 222 34517 103 163 118 95 164 231 110 163 248 226 163 234 104 161 251 238 37746 101 164 241 251 "
        "164 231 110 162 110 247 34517 239 19759 488",
    ),
    "Kana": (
        "青いソファーの上の赤いねこ、ガラス",
        "165 251 240 33523 3909 121 33371 94 13457 21575 19759 232 21575 164 113 97 33523 4813 255 4813 497 "
        "45262 3909 105 23007 39220",
    ),
    "Hangul": (
        "파란 소파 위의 빨간 고양이",
        "169 234 17003 252 478 15115 234 169 234 490 20909 226 8276 502 24193 101 21122 482 36216 254 31625 239 34746",
    ),
    "Tamil": (
        "நீல சோபாவில் சிவப்பு பூனை",
        "6022 357 11259 478 47705 6022 504 11259 489 47388 32831 6022 369 27126 47705 16631 6022 504 27126 "
        "6022 113 47388 16631 47388 33115 47388 11259 480 43394 11259 486",
    ),
    "Georgian": (
        "წითელი კატა ლურჯ დივანზე",
        "24829 105 24829 246 24829 245 24829 242 24829 248 24829 502 24829 247 24829 238 24829 95 24829 494 "
        "24829 248 24829 96 24829 254 24829 363 24829 241 24829 246 24829 243 24829 238 24829 250 24829 244 "
        "24829 498",
    ),
    "Armenian": (
        "կարմիր կատու կապույտ բազմոցի վրա",
        "145 107 145 94 146 222 145 112 145 104 146 478 145 107 145 94 145 123 145 116 146 480 145 107 145 94 "
        "145 118 145 116 146 224 145 113 145 379 145 95 145 94 145 99 145 112 145 116 146 223 145 360 145 122 "
        "146 222 145 350",
    ),
    "Ethiopic": (
        "ቀይ ድመት በሰማያዊ ሶፋ ላይ",
        "157 231 222 157 233 511 157 233 113 157 230 246 157 231 369 157 231 254 157 230 108 157 230 249 157 "
        "233 104 157 233 488 157 230 114 157 235 489 157 230 233 157 233 511",
    ),
    "emoji": (
        "a 🐱 cat 👩‍🚀 on the moon 🌕, 🇫🇷 flag, thumbs up 👍🏽",
        "320 22979 2368 26304 13542 525 518 3293 1576 243 267 16223 4859 267 17599 705 43722",
    ),
    "digits": (
        "3,000 years ago, 50% off, 1/2 cup; v2.0 (test) [x:1.2]",
        "274 267 271 271 271 1151 1468 267 276 271 260 1007 267 272 270 273 1937 282 341 273 269 271 263 1628 "
        "264 314 343 281 272 269 273 316",
    ),
    "contractions": (
        "it's the dog's bone, they're sure we've won, I'd say I'll go and can't",
        "585 568 518 1929 568 6195 267 889 982 1650 649 1200 1749 267 328 1896 1451 328 1342 861 537 753 713",
    ),
    "punctuation": (
        "best quality, ((masterpiece)), 8k!! wow!? a_b #tag @user",
        "949 3027 267 13796 12066 8 2361 279 330 748 2781 6004 320 318 321 258 3640 287 7031",
    ),
    "spaces": (
        "  A   Red\tApple \n on a  table  ",
        "320 736 3055 525 320 2175",
    ),
    "combining": (
        "cafe\u0301 n\u0303andu\u0301",
        "15304 6445 672 36019",
    ),
}
END = 49407


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The files of the tokenizer of SD 1.x in a folder, by no code under test but `tokenizer_files`."""
    folder = tmp_path_factory.mktemp("tokenizer")
    for name, content in clip_vocabulary.tokenizer_files(clip_vocabulary.PAD_TOKENS["sd15"]).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.fixture(scope="module")
def tokenize(written):
    return Tokenizer(written, 77)


@pytest.fixture(scope="module")
def transformers_tokenizer(written):
    return CLIPTokenizer(
        str(written / "vocab.json"),
        str(written / "merges.txt"),
        pad_token=clip_vocabulary.END,
        model_max_length=77,
    )


def ids_of(script):
    prompt, ids = PROMPTS[script]
    return prompt, [49406, *map(int, ids.split()), END]


@pytest.mark.parametrize("script", PROMPTS)
def test_the_ids_are_those_of_openclip_and_of_transformers(tokenize, transformers_tokenizer, script):
    prompt, expected = ids_of(script)
    (ids,) = tokenize([prompt])
    theirs = transformers_tokenizer([prompt], padding="max_length", truncation=True, return_tensors="np").input_ids[0]
    print(f"{script}: {prompt!r} is {expected}")
    assert ids.tolist() == theirs.tolist() == expected + [END] * (77 - len(expected))
    assert all(len(ids_of(script)[1]) <= 77 for script in PROMPTS) and len(PROMPTS) >= 12


def test_the_vocabulary_is_openais(written):
    vocabulary = json.loads((written / "vocab.json").read_bytes())
    assert list(vocabulary.values()) == list(range(49408))
    some = {"!": 0, "a</w>": 320, "cat</w>": 2368, "<|startoftext|>": 49406, "<|endoftext|>": END}
    assert {token: vocabulary[token] for token in some} == some
    merges = (written / "merges.txt").read_bytes()
    assert merges.startswith(b"#version: 0.2\ni n\nt h\n") and merges.endswith(b"\njeky ll</w>\n")
    # of the first 48,894 merges in bpe_simple_vocab_16e6.txt
    assert hashlib.sha256(merges).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


@pytest.mark.parametrize(("kind", "pad"), [("sd15", END), ("sd21", 0), ("sd21-base", 0)])
def test_a_prompt_is_filled_with_the_token_of_the_model(kind, pad):
    folder = clip_vocabulary.tokenizer_folder(kind)
    theirs = CLIPTokenizer.from_pretrained(folder)
    prompts = ["a photo of a cat", "", "wow! a!b"]
    ids = Tokenizer(folder, 77)(prompts)
    assert ids[0].tolist() == [49406, 320, 1125, 539, 320, 2368, END, *[pad] * 70]
    expected = theirs(prompts, padding="max_length", truncation=True, return_tensors="np").input_ids
    np.testing.assert_array_equal(ids, expected)
    assert set(PRESETS) == set(clip_vocabulary.PAD_TOKENS)


def test_threads_write_the_folder_once():
    found = []
    threads = [threading.Thread(target=lambda: found.append(clip_vocabulary.tokenizer_folder("sd15"))) for _ in "abcd"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4 and len(set(found)) == 1
    assert [path.name for path in found[0].parent.iterdir()] == [found[0].name]
    assert clip_vocabulary.tokenizer_folder("sd21") != found[0]


@pytest.mark.parametrize(("sd2", "pad"), [(False, END), (True, 0)])
def test_a_single_file_is_imported_without_a_hub_and_without_a_base(tmp_path, monkeypatch, sd2, pad):
    text = dataclasses.replace(tiny.TEXT, vocab_size=49408, max_position_embeddings=77)
    model = tiny.write_pipeline(tmp_path / "model", text_encoder=text)
    path = tmp_path / "single.safetensors"
    save_file(original_file.tensors_of(model, sd2), path)
    for kind in PRESETS:
        monkeypatch.setitem(PRESETS, kind, Configs(tiny.UNET, tiny.VAE, text, Schedule()))

    def refuse(*arguments, **settings):
        raise AssertionError(f"the hub was asked for {arguments}")

    monkeypatch.setattr(hub, "resolve", refuse)
    import_single_file(path, tmp_path / "out", prediction_type="epsilon" if sd2 else None)
    prompt, expected = ids_of("Cyrillic")
    (ids,) = Tokenizer(tmp_path / "out" / "tokenizer", 77)([prompt])
    assert ids.tolist() == expected + [pad] * (77 - len(expected))
