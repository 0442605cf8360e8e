"""ROUGE-L as Super-NaturalInstructions scores it, without a package.

It equals Google's rouge_score (rougeL F-measure, use_stemmer=True, default tokenizer) to the last bit.
"""
import functools
import re

# ------------------------------------------------------------------------------------------------------------- words


def words(text: str) -> list[str]:
    """Lower-cased runs of ASCII letters and digits, those of more than three characters stemmed."""
    return [stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


# Porter's algorithm (Porter 1980, "An algorithm for suffix stripping") with the changes of NLTK's default mode, which
# rouge_score uses. A word's *shape* has c or v for each letter, and its measure m is the number of "vc" in it.

IRREGULAR = {"skies": "sky", "dying": "die", "lying": "lie", "tying": "tie", "news": "news", "inning": "inning",
             "innings": "inning", "outing": "outing", "outings": "outing", "canning": "canning", "cannings": "canning",
             "howe": "howe", "proceed": "proceed", "exceed": "exceed", "succeed": "succeed"}
STEP2 = {"ational": "ate", "tional": "tion", "enci": "ence", "anci": "ance", "izer": "ize", "bli": "ble", "alli": "al",
         "entli": "ent", "eli": "e", "ousli": "ous", "ization": "ize", "ation": "ate", "ator": "ate", "alism": "al",
         "iveness": "ive", "fulness": "ful", "ousness": "ous", "aliti": "al", "iviti": "ive", "biliti": "ble",
         "fulli": "ful", "logi": "log"}
STEP3 = {"icate": "ic", "ative": "", "alize": "al", "iciti": "ic", "ical": "ic", "ful": "", "ness": ""}
STEP4 = dict.fromkeys(["al", "ance", "ence", "er", "ic", "able", "ible", "ant", "ement", "ment", "ent", "ion", "ou", "ism",
                       "ate", "iti", "ous", "ive", "ize"], "")


def shape(word: str) -> str:
    """'c' for a consonant, 'v' for a vowel; y is a vowel after a consonant."""
    out = ""
    for letter in word:
        out += "v" if letter in "aeiou" or letter == "y" and out[-1:] == "c" else "c"
    return out


def measure(word: str) -> int:
    return shape(word).count("vc")


def ends_short(word: str) -> bool:
    """Ends consonant-vowel-consonant, the last not w, x or y; or is a vowel and a consonant."""
    s = shape(word)
    return s.endswith("cvc") and word[-1] not in "wxy" or s == "vc"


def replace_suffix(word: str, suffixes: dict[str, str], m: int) -> str:
    """Replace the longest of these suffixes where what stands before it has a measure above m."""
    for start in range(max(0, len(word) - 7), len(word)):               # the longest suffixes have seven letters
        suffix, rest = word[start:], word[:start]
        if suffix in suffixes:
            fits = measure(rest + "l" if suffix == "logi" else rest) > m and (suffix != "ion" or rest[-1] in "st")
            return rest + suffixes[suffix] if fits else word
    return word


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
        rest = word[:-2] if word.endswith("ed") else word[:-3] if word.endswith("ing") else ""
        if "v" in shape(rest):
            word = rest
            if word.endswith(("at", "bl", "iz")):
                word += "e"
            elif word[-1] == word[-2:-1] and shape(word)[-1] == "c":
                word = word if word[-1] in "lsz" else word[:-1]
            elif measure(word) == 1 and ends_short(word):
                word += "e"
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
    if word.endswith("e") and (measure(word[:-1]) > 1 or measure(word[:-1]) == 1 and not ends_short(word[:-1])):
        word = word[:-1]
    if word.endswith("ll") and measure(word[:-1]) > 1:
        word = word[:-1]
    return word


# ----------------------------------------------------------------------------------------------------------- metrics

def longest_common_subsequence(a: list[str], b: list[str]) -> int:
    """Its length, by whole rows of the usual table as the bits of one integer (Hyyrö 2004): O(len(b)) operations.

    Bit i of `row` is 0 where the table's entry grows from a[:i] to a[:i + 1].
    """
    places = {}
    for i, word in enumerate(a):
        places[word] = places.get(word, 0) | 1 << i
    full = row = (1 << len(a)) - 1
    for word in b:
        matches = row & places.get(word, 0)
        row = (row + matches | row - matches) & full
    return len(a) - row.bit_count()


def rouge_l(prediction: str, references: list[str]) -> float:
    """ROUGE-L F-measure in [0, 1], the largest over the references (Lin 2004)."""
    predicted, best = words(prediction), 0.0
    for reference in map(words, references):
        common = longest_common_subsequence(predicted, reference)
        if common:
            precision, recall = common / len(predicted), common / len(reference)
            best = max(best, 2 * precision * recall / (precision + recall))
    return best
