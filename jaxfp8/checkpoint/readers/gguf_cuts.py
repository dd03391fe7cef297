# ruff: noqa: SIM905 - a table of names reads best as words
"""The pre-tokenizers of byte-level GGUF vocabularies: how text is cut into pieces before merging, by `tokenizer.ggml.pre`.

The cuts are those of llama.cpp's src/llama-vocab.cpp (`llm_tokenizer_bpe`) and src/unicode.cpp as of commit 0c1e57098, in the
syntax of Oniguruma, which Hugging Face's tokenizers use. Where llama.cpp cuts in another way than the tokenizer.json from which
a name was made, llama.cpp is followed: its digits `\\d` are ASCII, and letters outside ASCII are both upper and lower case.
"""

# Each cut of a sequence splits the pieces of the cut before it, into its matches and the text between them.
_SPACES = r"|\s+(?!\S)|\s+"
_LINES = r"|\s*[\r\n]+" + _SPACES
_SHORT = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])"  # the 's of it's, and its like
_SIGN = r"[^\r\n\p{L}\p{N}]?"  # one leading sign or space
_SIGNS = r"| ?[^\s\p{L}\p{N}]+"
_UPPER, _LOWER = r"(?:(?=\p{L})[^a-z])", r"(?:(?=\p{L})[^A-Z])"
_LETTER_OR_MARK = r"[\p{L}\p{M}]"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+" + _SIGNS + _SPACES
_DIGIT, _THREE_DIGITS, _DIGITS = r"\p{N}", r"\p{N}{1,3}", r"\p{N}+"
# The first digits of a number stay with the text before them.
_THREE_FROM_THE_RIGHT = r"\P{N}*\p{N}{1,3}(?=(?:\p{N}{3})*(?!\p{N}))"


def _words(digits: str, short: str = _SHORT + "|", word: str = _SIGN + r"\p{L}+") -> str:
  """The cut of Llama 3 and its many relatives, which differ in the digits of a number."""
  return short + word + "|" + digits + _SIGNS + r"[\r\n]*" + _LINES


def _cased(word_end: str, digits: str, upper: str = _UPPER, lower: str = _LOWER) -> str:
  """The cut of GPT-4o: words are also cut before a capital inside."""
  words = f"{_SIGN}{upper}*{lower}+{word_end}|{_SIGN}{upper}+{lower}*{word_end}"
  return words + "|" + digits + _SIGNS + r"[\r\n/]*" + _LINES


_CJK = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
_CJK_AND_KOREAN = "(?:(?!\\s)[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff])+"
_DEEPSEEK3 = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+"""
_HAN = (
  "[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0002a6df\U0002a700-\U0002b73f\U0002b740-\U0002b81f"
  "\U0002b820-\U0002ceaf\U0002ceb0-\U0002ebef\U0002f800-\U0002fa1f]"
)
_BLOOM = " ?[^(\\s|.,!?\u2026\u3002\uff0c\u3001\u0964\u06d4\u060c)]+"
_AFMOE_SCRIPTS = (
  "[\u4e00-\u9fff\u3400-\u4dbf\u8c48-\ufaff\u3040-\u309f\u30a0-\u30ff\uff65-\uff9f\u2f00-\u2fdf\u0e40-\u0e7f\u0e80-\u0eff"
  "\u1780-\u17ff\u1000-\u109f\uaa60-\uaa7f\ua9e0-\ua9ff\uac00-\ud7af\u1100-\u11ff]+"
)
_YOUTU_SCRIPTS = (
  "[\uac00-\ud7a3\u3131-\u318e]+|[\uff01\u2026\u201c\u201d\u2018\u2019\u2014\uff1a\uff1b\uff0c\u3001-\u303f\ufe30-\ufe4f]+"
  "|[\u3105-\u312f]+|" + _CJK
)
_DEEPSEEK_LETTERS = (
  "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
  "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
  "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a"
  "\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
  "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
  "\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149"
  "\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f"
  "\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f"
  "\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
  "\U0001e900-\U0001e943"
)
_JAIS2_SPACES = "|" + "|".join(rf"\s{{{n}}}(?!\S)" for n in (512, 256, 128, 64, 32, 16, 8, 4, "1,2")) + r"|\s{1}"

_SUPERBPE = r"(?=([0-9]{3})+(?![0-9]))"
_TRAILING = r"\s+\z"
# Their time grows with the square of a text without digits, of digits, or of spaces.
QUADRATIC_CUTS = frozenset((_THREE_FROM_THE_RIGHT, _SUPERBPE, _TRAILING))

# The names that each sequence of cuts has.
_TABLE: tuple[tuple[tuple[str, ...], str], ...] = (
  ((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, _DIGITS, r"[0-9][0-9][0-9]"), "default"),
  ((_GPT2,), "gpt-2 phi-2 jina-es jina-de gigachat jina-v2-es jina-v2-de a.x-4.0 mellum modern-bert jina-v1-en jina-v2-code"),
  ((_GPT2,), "roberta-bpe mpt olmo jais exaone4 trillion granite-docling"),
  ((_DIGIT, _GPT2), "smollm starcoder refact command-r codeshell exaone minerva-7b mellum2"),
  ((_words(_THREE_DIGITS),), "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano"),
  ((_words(_THREE_DIGITS),), "dbrx smaug-bpe chatglm-bpe glm4 glm5"),
  ((_words(_DIGIT),), "qwen2 deepseek-r1-qwen kormo f2llmv2 stablelm2 megrez hunyuan grok-2 solar-open"),
  ((r"[^\n]+|[\n]+", _words(_DIGIT)), "laguna"),
  ((_THREE_DIGITS, _words(_DIGITS)), "minicpm5"),
  ((_words(_DIGIT, short=""),), "ufakzeka"),
  ((_words(_THREE_DIGITS).removesuffix(_SPACES) + _JAIS2_SPACES,), "jais-2"),
  ((_SHORT + "|" + _SIGN + r"[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*" + _LINES,), "qwen35"),
  ((_SHORT + "|" + _SIGN + r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+" + _LINES,), "seed-coder"),
  (
    (
      r"'(?:[sSdDmMtT]|[lL][lL]|[vV][eE]|[rR][eE])|"
      + _SIGN + r"\p{L}+|\p{N}" + _SIGNS + r"[\r\n]*|\s*[\r\n]" + _SPACES,
    ),
    "bailingmoe bailingmoe2 llada-moe",
  ),
  (
    (_SHORT + "|" + _SIGN + r"(?:\p{L}\p{M}*(?: \p{L}\p{M}*)*)+|\p{N}" + _SIGNS + r"[\r\n/]?|\s*[\r\n]" + _SPACES,),
    "exaone-moe",
  ),
  ((r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, r"[0-9][0-9][0-9]"), "falcon"),
  (
    (
      r"[\r\n]", rf"\s?[{_DEEPSEEK_LETTERS}]+", "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3001-\u3002]+",
      _TRAILING, _CJK_AND_KOREAN, _DIGITS,
    ),
    "deepseek-llm",
  ),
  ((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK_AND_KOREAN, _DIGIT), "deepseek-coder"),
  ((_THREE_DIGITS, _CJK, _DEEPSEEK3 + r"[\r\n]*" + _LINES), "deepseek-v3 hunyuan-dense joyai-llm hy_v4"),
  ((_THREE_DIGITS, _CJK, _DEEPSEEK3 + r"|[\r\n]" + _SPACES, _DIGIT), "spark2_5"),
  ((_THREE_FROM_THE_RIGHT, _AFMOE_SCRIPTS, _DEEPSEEK3 + r"[\r\n]*" + _LINES), "afmoe"),
  ((_BLOOM,), "bloom poro-chat gpt3-finnish"),
  ((_BLOOM, _DIGIT), "viking"),
  ((_cased("", _DIGIT),), "tekken"),
  ((_cased(f"{_SHORT}?", _THREE_DIGITS),), "gpt-4o llama4 kanana2 talkie minimax-m2"),
  (
    (_cased(f"{_SHORT}?", _THREE_DIGITS, rf"(?:(?={_LETTER_OR_MARK})[^a-z])", rf"(?:(?={_LETTER_OR_MARK})[^A-Z])"),),
    "granite-embed-multi-97m",
  ),
  ((_THREE_FROM_THE_RIGHT, _cased(f"{_SHORT}?", _THREE_DIGITS, _LETTER_OR_MARK, _LETTER_OR_MARK)), "tiny_aya cohere2moe"),
  ((_YOUTU_SCRIPTS, _cased(f"{_SHORT}?", _DIGIT, _LETTER_OR_MARK, _LETTER_OR_MARK)), "youtu"),
  (
    (
      r"<sentinel:[0-9]+>", "(IMGIMG)((A|B|C|D|E|F|G|H|I){1,4})Z", r"([\t\n]|    |  )", _DIGIT, r"[\p{P}!-/:-@\[-`{-~]",
      _GPT2,
    ),
    "chameleon",
  ),
  ((_DIGITS, _SUPERBPE), "superbpe"),
  ((f"{_HAN}+|" + _words(_THREE_DIGITS, "", rf"{_SIGN}(?:(?!{_HAN})\p{{L}})+{_SHORT}?"),), "kimi-k2"),
)  # fmt: skip

CUTS = {name: cuts for cuts, names in _TABLE for name in names.split()}

_LLAMA3 = "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano".split()
# A piece that is a whole token skips the merges.
IGNORE_MERGES = frozenset((*_LLAMA3, *"minicpm5 youtu glm4 glm5 tekken granite-embed-multi-97m".split()))
# BOS is written unless the file says otherwise.
ADD_BOS = frozenset((*_LLAMA3, "tekken", "chameleon"))
