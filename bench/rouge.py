"""ROUGE-L and exact match, as Super-NaturalInstructions' official script has them.

ROUGE-L needs no package and equals Google's rouge_score (rougeL F-measure, use_stemmer=True,
default tokenizer) to the last bit.
"""
import functools
import re
import string

# -------------------------------------------------------------------------------------- metrics

WITHOUT_PUNCTUATION = str.maketrans("", "", string.punctuation)


def exact_match(prediction: str, references: list[str], strict: bool = False) -> float:
    """1.0 where the prediction is one of the references, else 0.0.

    As in the official script both are lower-cased, without ASCII punctuation, white space folded.
    strict: white space alone is folded (the built-in suite, whose brackets and quotes count).
    """
    def folded(text):
        text = text if strict else text.lower().translate(WITHOUT_PUNCTUATION)
        return " ".join(text.split())
    return float(folded(prediction) in map(folded, references))


def rouge_l(prediction: str, references: list[str]) -> float:
    """ROUGE-L F-measure in [0, 1], the largest over the references (Lin 2004)."""
    predicted, best = words(prediction), 0.0
    for reference in map(words, references):
        common = longest_common_subsequence(predicted, reference)
        if common:
            precision, recall = common / len(predicted), common / len(reference)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best


def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, in O(len(b)) operations on integers (Hyyrö 2004).

    A whole row of the usual table is the bits of one integer: bit i of `row` is 0 where the
    table's entry grows from a[:i] to a[:i + 1].
    """
    places = {}                                         # word -> a bit for each place in a
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | (1 << i)
    full = row = (1 << len(a)) - 1
    for word in b:
        matches = row & places.get(word, 0)
        row = ((row + matches) | (row - matches)) & full
    return len(a) - row.bit_count()


def words(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits, those over three characters stemmed."""
    found = re.findall("[a-z0-9]+", text.lower())
    return [stem(word) if len(word) > 3 else word for word in found]


# ------------------------------------------------------------------------------------- stemming
# Porter's algorithm (Porter 1980, "An algorithm for suffix stripping") with the changes of
# NLTK's default mode, which rouge_score uses. A word's *shape* has c or v for each letter, and
# its measure m is the number of "vc" in it.

IRREGULAR = {                                           # word -> its stem
    "skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news",
    "inning": "inning", "innings": "inning", "outing": "outing", "outings": "outing",
    "canning": "canning", "cannings": "canning", "howe": "howe", "proceed": "proceed",
    "exceed": "exceed", "succeed": "succeed",
}
STEP2 = {                                               # suffix -> what takes its place
    "ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize",
    "bli": "ble", "alli": "al", "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize",
    "ation": "ate", "ator": "ate", "alism": "al", "iveness": "ive", "fulness": "ful",
    "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble", "fulli": "ful",
    "logi": "log",
}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "",
         "ness": ""}
STEP4 = dict.fromkeys(["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment",
                       "ent", "ion", "ou", "ism", "ate", "iti", "ous", "ive", "ize"], "")
LONGEST_SUFFIX = 7


@functools.lru_cache(maxsize=1 << 20)
def stem(word: str) -> str:
    """Stem of a lower-case word of more than two characters."""
    if word in IRREGULAR:
        return IRREGULAR[word]
    # 1a: plurals
    if word.endswith("ies"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("sses"):
        word = word[:-2]
    elif word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    # 1b: -ed and -ing
    if word.endswith("ied"):
        word = word[:-1] if len(word) == 4 else word[:-2]
    elif word.endswith("eed"):
        word = word[:-1] if measure(word[:-3]) > 0 else word
    else:
        word = without_ed_or_ing(word)
    # 1c: -y
    if word.endswith("y") and len(word) > 2 and shape(word)[-2] == "c":
        word = word[:-1] + "i"
    # 2 to 4: derivational suffixes
    if word.endswith("alli") and measure(word[:-4]) > 0:
        word = word[:-2]
    word = replace_suffix(word, STEP2, 0)
    word = replace_suffix(word, STEP3, 0)
    word = replace_suffix(word, STEP4, 1)
    # 5: a last e, a double l
    if word.endswith("e"):
        m = measure(word[:-1])
        if m > 1 or (m == 1 and not ends_short(word[:-1])):
            word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


def without_ed_or_ing(word: str) -> str:
    """The word without -ed or -ing, where a vowel is left; mended as in `hoping`, `hopping`."""
    rest = ""
    if word.endswith("ed"):
        rest = word[:-2]
    elif word.endswith("ing"):
        rest = word[:-3]
    if "v" not in shape(rest):
        return word
    if rest.endswith(("at", "bl", "iz")):
        return rest + "e"
    if rest[-1] == rest[-2:-1] and shape(rest)[-1] == "c":
        return rest if rest[-1] in "lsz" else rest[:-1]
    if measure(rest) == 1 and ends_short(rest):
        return rest + "e"
    return rest


def replace_suffix(word: str, suffixes: dict[str, str], m: int) -> str:
    """Replace the longest of these suffixes if what stands before it has a measure above m."""
    for start in range(max(0, len(word) - LONGEST_SUFFIX), len(word)):
        rest, suffix = word[:start], word[start:]
        if suffix not in suffixes:
            continue
        if measure(rest + "l" if suffix == "logi" else rest) <= m:
            return word
        if suffix == "ion" and rest[-1] not in "st":
            return word
        return rest + suffixes[suffix]
    return word


def shape(word: str) -> str:
    """'c' for a consonant, 'v' for a vowel; y is a vowel after a consonant."""
    out = ""
    for letter in word:
        vowel = letter in "aeiou" or (letter == "y" and out[-1:] == "c")
        out += "v" if vowel else "c"
    return out


def measure(word: str) -> int:
    return shape(word).count("vc")


def ends_short(word: str) -> bool:
    """Ends consonant-vowel-consonant, the last not w, x or y; or is a vowel and a consonant."""
    s = shape(word)
    return (s.endswith("cvc") and word[-1] not in "wxy") or s == "vc"
