"""P3's templates: rendered as promptsource does, told as instructions, and the fields they show.

bench/p3_fields.yaml lists which of a row's fields the student reads. That list is derived here from
each template's syntax tree: a field is read where the input shows it or words a condition by it.
The student reads the prompt instead where the fields would tell it more than the prompt, or less.
"""
import os
import random
import resource
import time
from collections import Counter
from pathlib import Path

import pytest
from jinja2 import nodes

import common
from bench import p3
from bench.sandbox import ENVIRONMENT
from bench.templates import Template, load_templates, own_variables

P3 = Path(os.environ["TAGI_DATA"]) / "p3" if "TAGI_DATA" in os.environ else None
real_data = pytest.mark.skipif(P3 is None, reason="TAGI_DATA names no folder with P3's templates")

LISTED = common.read_yaml(Path(p3.__file__).parent / "p3_fields.yaml", "")
DATASETS = {*p3.TRAIN, *p3.TEST.values()}
NOT_FIELDS = {"answer_choices", "zip", "range", "loop", "dict", "cycler", "joiner", "namespace"}


# ---------------------------------------------------------------------------------------- rendering

COPA = {"premise": "The sun rose.", "choice1": "It got warm.", "choice2": "It got dark.",
        "question": "effect", "label": 0}
RTE = {"premise": "A cat sat.", "hypothesis": "A cat stood.", "label": 1}


@pytest.mark.parametrize("template, row, rendered", [
    (Template("d", "fixed choices",
              '{{premise}} Is "{{hypothesis}}" so? ||| {% if label != -1 %}'
              "{{ answer_choices[label] }}{% endif %}", "Yes ||| No"),
     RTE, ('A cat sat. Is "A cat stood." so?', "No", ["Yes", "No"])),
    (Template("d", "choices per row, condition",
              '{{ premise }} {% if question == "cause" %} because... {% else %} so... {% endif %}\n'
              "- {{choice1}}\n- {{choice2}} ||| {{ answer_choices[label] }}",
              "{{choice1}} ||| {{choice2}}"),
     COPA, ("The sun rose.  so... \n- It got warm.\n- It got dark.", "It got warm.",
            ["It got warm.", "It got dark."])),
    (Template("d", "choices in the prompt",
              "{{premise}} {{ answer_choices | join(' or ') }}? ||| {{ answer_choices[label] }}",
              "Yes ||| Maybe ||| No"),
     RTE, ("A cat sat. Yes or Maybe or No?", "Maybe", ["Yes", "Maybe", "No"])),
    (Template("d", "1-based strings",
              "{{sentence}} ||| {{ answer_choices[answer | int - 1] }}", "{{a}} ||| {{b}}"),
     {"sentence": "x _ y", "a": "Ann", "b": "Bo", "answer": "2"}, ("x _ y", "Bo", ["Ann", "Bo"])),
    (Template("d", "loop, zip, open-ended",
              "{% for k, v in zip(keys, values) %}{{k}}={{v}};{% endfor %} ||| {{target}}"),
     {"keys": ["a", "b"], "values": [1, 2], "target": " t "}, ("a=1;b=2;", "t", [])),
    (Template("d", "most frequent", "{{ votes | most_frequent | join(',') }} ||| {{ votes[0] }}"),
     {"votes": list("abcab")}, ("a,b", "a", [])),
    (Template("d", "pipes in the row", "{{text}}! ||| {{text}}", "{{text}} ||| b"),
     {"text": "a|||c"}, ("a|||c!", "a|||c", ["a|||c", "b"])),
    (Template("d", "three pieces", "{{premise}} ||| {{hypothesis}} ||| {{label}}"), RTE, None),
    (Template("d", "another kind of row",
              '{% if question == "cause" %}{{premise}} ||| {{choice1}}{% endif %}'), COPA, None),
    (Template("d", "hidden label", "{{premise}} ||| {% if label != -1 %}{{label}}{% endif %}"),
     RTE | {"label": -1}, None)],
    ids=lambda x: x.name if isinstance(x, Template) else "")
def test_rendering_equals_what_is_rendered_by_hand(template, row, rendered):
    assert template.render(row) == rendered


def test_long_fields_are_cut_as_in_promptsource():
    """`| string | truncate(2048)` in every expression: 2 048 characters with the dots, at a word's
    end."""
    template = Template("d", "t", "{{text}} ||| {{text[0]}}")
    prompt, target, _ = template.render({"text": "word " * 1000})
    assert len(prompt) <= 2048 and prompt.endswith("word...") and target == "w"


def test_a_random_choice_is_a_function_of_template_and_row():
    row = {"items": list("abcdefgh")}
    template = Template("d", "t", "{{ items | choice }} ||| x")
    first = [template.render(row, n) for n in range(30)]
    random.seed(5)
    assert first == [template.render(row, n) for n in range(30)]
    assert len({prompt for prompt, _, _ in first}) > 4
    other = Template("d", "u", "{{ items | choice }} ||| x")
    assert first != [other.render(row, n) for n in range(30)]


@pytest.mark.parametrize("jinja", [
    "{{ ''.__class__.__mro__ }} ||| x",
    "{{ premise.__class__.__base__.__subclasses__() }} ||| x",
    "{{ cycler.__init__.__globals__.os.system('true') }} ||| x",
    "{{ (premise | attr('__class__')).mro() }} ||| x",
    "{% for i in range(10 ** 9) %}{% endfor %} ||| x"])
def test_a_template_that_reaches_for_pythons_insides_is_refused(jinja):
    with pytest.raises(common.UserError, match="super_glue/rte, template 't', row 7"):
        Template("super_glue/rte", "t", jinja).render(RTE, 7)


def test_yaml_with_another_tag_is_refused(tmp_path):
    (tmp_path / "rte").mkdir()
    (tmp_path / "rte/templates.yaml").write_text(
        f"templates: !!python/object/apply:os.system ['touch {tmp_path}/done']\n")
    with pytest.raises(common.UserError,
                       match="rte/templates.yaml.*could not determine a constructor"):
        load_templates(str(tmp_path))
    assert not (tmp_path / "done").exists()


# ------------------------------------------------------------------------------------------- bounds

GROWING = "{% set ns = namespace(x=X, y=X) %}{% for i in range(99) %}{% set ns.x = F %}{% set ns.y = F %}{% endfor %}"
TOO_MUCH = [
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}{% for j in range(9999) %}{{i}}{% endfor %}{% endfor %}",
    "{% for i in range(9999) %}" * 3 + "x" + "{% endfor %}" * 3,
    "{% for i in range(99999) %}" + "a long text " * 900 + "{% endfor %}",
    "{% set x %}{% for i in range(99999) %}" + "a long text " * 900 + "{% endfor %}{% endset %}{{x}}",
    "{% for i in range(99999) %}{% if -1 in range(99999) | list %}{% endif %}{% endfor %}",
    "{% set xs = range(99999) | list %}{% for i in xs %}{% set y = xs[1:] %}{% endfor %}",
    "{% set xs = range(99999) | list %}{% for i in xs %}{% if xs == [0] %}{% endif %}{% endfor %}",
    "{% set xs = range(99999) | list %}{% for i in xs %}{{xs.index(i)}}{% endfor %}",
    "{% set xs = range(99999) | list %}{% for i in xs %}{{xs | max}}{% endfor %}",
    "{% for i in range(99999) %}{{loop.cycle(premise * 999)}}{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ ('a' * 10**10) }}", "{{ (10**10 * 'a') }}", "{{ ([0] * 10**9) }}", "{{ (([0] * 9999) * 9999) }}",
    "{{ 10**10**10 }}", "{{ (9**9)**(9**9) }}", "{{ (10**98)**98 }}", "{{ 2.0**99999 }}", "{{ 7**'a' }}",
    "{{ 'a' | center(10**9) }}", "{{ 'a'.center(10**9) }}", "{{ 'a'.ljust(10**9) }}", "{{ '1'.zfill(10**9) }}",
    "{{ 'a\tb'.expandtabs(10**9) }}", "{{ (5).to_bytes(10**9, 'big') }}", "{{ 'a' | indent(10**9) }}",
    "{{ ('%999999999d' % 1) }}", "{{ '%*d' | format(10**9, 1) }}", "{{ '{:>999999999}'.format(1) }}", "{{ '{:>{}}'.format(1, 10**9) }}",
    "{{ '{a:>999999999}'.format_map({'a': 1}) }}", "{{ range(9999) | map('center', 10**9) | list }}", "{{ 1.5 | round(10**9, 'ceil') }}",
    "{{ [1] | batch(10**9, 0) | list }}", "{{ [1] | slice(10**9) | list }}", "{{ lipsum(n=10**6) }}", "{{ range(10**9) }}",
    "{{ range(99999) | map('string') | join(premise * 999) }}", "{{ (premise * 999).join(['a'] * 99999) }}",
    "{{ (premise * 999).replace('', premise * 999) }}", "{{ premise * 999 | replace('', premise * 999) | replace('', 'abc') }}",
    "{{ [[1]] * 99999 | sum(start=[]) }}", "{{ ('f' * 99999) | int(base=16) }}", "{{ premise | urlize }}", "{{ premise | tojson(indent=10**9) }}",
    GROWING.replace("X", "'ab'").replace("F", "ns.x ~ ns.x") + "{{ns.x}}", GROWING.replace("X", "'ab'").replace("F", "ns.x + ns.x") + "{{ns.x}}",
    GROWING.replace("X", "'ab'").replace("F", "[ns.x, ns.x] | join") + "{{ns.x}}", GROWING.replace("X", "[1]").replace("F", "ns.x + ns.x") + "{{ns.x}}",
    GROWING.replace("X", "[1]").replace("F", "[ns.x, ns.x]") + "{{ns.x}}", GROWING.replace("X", "[1]").replace("F", "(ns.x, ns.x)") + "{{ns.x == ns.y}}",
    GROWING.replace("X", "{}").replace("F", "{'a': ns.x, 'b': ns.x}") + "{{ns.x}}", GROWING.replace("X", "99").replace("F", "ns.x * ns.x") + "{{ns.x}}",
    GROWING.replace("X", "{}").replace("F", "dict(a=ns.x, b=ns.x)") + "{{ns.x}}", GROWING.replace("X", "'ab'").replace("F", "ns.x.replace('', ns.x)"),
    "{% macro f(n) %}{{f(n)}}{{f(n)}}{% endmacro %}{{f(1)}}", "{% for x in [1] recursive %}{{loop([1, 1])}}{% endfor %}",
    "{% call(x) f() %}{% endcall %}", "{% include 'x' %}", "{% import 'x' as x %}", "{% extends 'x' %}", "{% block x %}{{self.x()}}{% endblock %}",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{{ 1" + " + 1" * 9000 + " }}", "{{ premise" + ".x" * 5000 + " }}", "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "{% for i in [1] %}" * 40 + "{% endfor %}" * 40, "x" * 100_000]


@pytest.mark.parametrize("jinja", TOO_MUCH, ids=range(len(TOO_MUCH)))
@pytest.mark.parametrize("where", ["prompt", "target", "choices"])
def test_a_template_ends_in_a_line_whatever_it_asks_for(jinja, where):
    """Within seconds, as the processor counts them, and without much memory, as this test's process has it."""
    texts = {"prompt": (f"{jinja} ||| x", None), "target": (f"x ||| {jinja}", None), "choices": ("x ||| a", f"a ||| {jinja}")}[where]
    begin, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(common.UserError) as error:
        Template("super_glue/rte", "a name", *texts).render(RTE, 3)
    assert str(error.value).startswith("super_glue/rte, template 'a name'") and len(str(error.value)) <= 300
    assert time.process_time() - begin < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 1_000_000          # kilobytes


def test_variables_of_variables_do_not_double_a_templates_words_without_end():
    jinja = "{% set a0 = 'word' %}" + "".join(f"{{% set a{n} = a{n - 1} ~ a{n - 1} %}}" for n in range(1, 60))
    begin = time.process_time()
    with pytest.raises(common.UserError, match="super_glue/rte, template 't'.*more than a prompt can need"):
        Template("super_glue/rte", "t", jinja + "{{a59}} ||| x").text
    assert time.process_time() - begin < 10


@pytest.mark.parametrize("jinja, rendered", [
    ("{% for i in range(2000) %}{{ (i % 10) }}{% endfor %}", "0123456789" * 200), ("{{ ((premise ~ ' ') * 3) }}", "A cat sat. " * 2 + "A cat sat."),
    ("{{ premise.split(' ') | map('upper') | join('-') }}", "A-CAT-SAT."), ("{{ ((label + 2) ** 2 - 1) }}", "8"),
    ("{% for k, v in {'a': 1}.items() %}{{k}}={{v}}{% endfor %}", "a=1"), ("{{ [3, 1, 2] | sort | reverse | list | first }}", "3"),
    ("{% for a, b in zip([1, 2], 'a b'.split()) if a > 1 %}{{loop.index}}{{b}}{% endfor %}", "1b"),
    ("{% with x = premise[2:5] %}{{x | title}}{% endwith %}", "Cat"), ("{{ ['b', 'a'] | sort | join(', ') | replace('a', 'c') }}", "c, b"),
    ("{% set ns = namespace(n=0) %}{% for x in [1, 2, 3] %}{% set ns.n = ns.n + x %}{% endfor %}{{ns.n}}", "6"),
    ("{{ 'yes' if hypothesis is string and label == 1 and 'cat' in premise else 'no' }}", "yes"), ("{{ 12345678901234567890 }}", "12345678901234567890")])
def test_what_a_prompt_can_need_is_rendered_within_the_bounds(jinja, rendered):
    assert Template("d", "t", jinja + " ||| x").render(RTE, 3)[0] == rendered


# ------------------------------------------------------------------------------------- the analysis

def analyse(template: Template) -> tuple[list[str], str | None]:
    """(names of the fields that its input shows, in order; why the prompt is read, None: it isn't).

    "answer": the target is made of a field that the input shows too, or of a certain one of several
    choices; "part": the input shows a part of a field; "random": a random choice among fields.
    """
    tree = ENVIRONMENT.parse(template.jinja)
    answers = ENVIRONMENT.parse(template.answer_choices or "")
    own = own_variables(tree)
    shown, target = sides(tree.body)
    choice_fields = names([answers], {})
    fields = [name for node in shown for name in names([node], own)]
    if "answer_choices" in fields:
        fields += choice_fields
    fields = [name for name in dict.fromkeys(fields) if name not in NOT_FIELDS]
    answered_by = set(names(target, own))
    for n in every(target, nodes.Getitem):
        if is_choices(n.node) and isinstance(n.arg, nodes.Const):
            answered_by |= set(choice_fields)
    if answered_by & set(fields):
        return fields, "answer"
    if partly_shown(shown, own):
        return fields, "part"
    return fields, "random" if random_fields(shown, own) else None


def fields_of(template: Template) -> list[str] | None:
    fields, reason = analyse(template)
    return None if reason else fields


def is_choices(node) -> bool:
    return isinstance(node, nodes.Name) and node.name == "answer_choices"


def every(trees, kind, own=None):
    """Nodes of a kind in these expressions, and in those that the variables in them stand for.

    own: `own_variables`. Of names those are left out that stand for an expression.
    """
    for tree in trees:
        for n in [tree, *tree.find_all(nodes.Node)]:
            if own and isinstance(n, nodes.Name) and n.name in own:
                others = {name: x for name, x in own.items() if name != n.name}
                yield from every([own[n.name]], kind, others)
            elif isinstance(n, kind):
                yield n


def names(trees, own) -> list[str]:
    """Names of fields in these expressions, a template's own variables resolved."""
    return [n.name for n in every(trees, nodes.Name, own)]


def sides(children) -> tuple[list, list]:
    """The expressions before the "|||" and those after it, conditions of what is worded included.

    A condition around both sides only says whether the template applies, so it is on neither.
    """
    before, after, met = [], [], False
    for node in children:
        here = after if met else before
        if isinstance(node, nodes.TemplateData):
            met = met or "|||" in node.data
        elif isinstance(node, (nodes.If, nodes.For, nodes.Output)):
            if met and isinstance(node, nodes.If) and node.else_:
                continue                            # one or the other: which, the input doesn't say
            if isinstance(node, nodes.Output):
                heads, bodies = [], [node.nodes]
            elif isinstance(node, nodes.For):
                heads, bodies = [node.iter], [node.body, node.else_]
            else:                                   # each elif is a side of its own
                heads, bodies = [node.test], [node.body, *([n] for n in node.elif_), node.else_]
            for body in bodies:
                first, last = sides(body)
                here.extend(first)
                after.extend(last)
            if any(splits(body) for body in bodies):
                met = True
            else:
                here.extend(heads)
        elif not isinstance(node, nodes.Assign):
            here.append(node)
    return before, after


def splits(children) -> bool:
    return any("|||" in n.data for n in every(children, nodes.TemplateData))


def partly_shown(shown, own) -> set:
    """Fields shown by a slice or some items, nowhere whole, nor by items 0, 1, .. one by one."""
    items, whole = {}, {n.name for n in shown if isinstance(n, nodes.Name)}
    for n in every(shown, nodes.Getitem, own):
        index = n.arg.value if isinstance(n.arg, nodes.Const) else n.arg
        if not is_choices(n.node) and isinstance(index, (int, nodes.Slice)):
            for name in names([n.node], own):
                items.setdefault(name, set()).add(index)
    partly = {name for name, found in items.items()
              if len(found) < 2 or found != set(range(len(found)))}
    return partly - whole


def random_fields(shown, own) -> bool:
    """Whether a random choice decides which field or item these expressions show."""
    indices = [n.arg for n in every(shown, nodes.Getitem, own)]
    if any(n.name == "choice" for n in every(indices, nodes.Filter, own)):
        return True
    chosen = [n for n in every(shown, nodes.Filter, own) if n.name == "choice"]
    return any(set(names([n], own)) - NOT_FIELDS for n in chosen)


# ------------------------------------------------------------------------------------ made-up cases

@pytest.mark.parametrize("jinja, choices, text, fields", [
    ('{{premise}} Is "{{hypothesis}}" so? ||| {% if label != -1 %}{{ answer_choices[label] }}'
     "{% endif %}", "Yes ||| No",
     'premise Is "hypothesis" so?\nAnswers: Yes, No', ["premise", "hypothesis"]),
    ('{{ premise }} {% if question == "cause" %}because{% else %}so{% endif %} '
     "{{answer_choices[0]}} or {{answer_choices[1]}}? ||| {{ answer_choices[label] }}",
     "{{choice1}} ||| {{choice2}}",
     "premise  because / so  choice1 or choice2?\nAnswers: choice1, choice2",
     ["premise", "question", "choice1", "choice2"]),
    ('{% if question == "effect" %}\n{{ premise }} What next? ||| {{answer_choices[label]}}'
     "{% endif %}", "{{choice1}} ||| {{choice2}}",
     "premise What next?\nAnswers: choice1, choice2", ["premise"]),
    ("{% if l == 0 %}{{a}} ||| {{t}}{% elif l == 1 %}{{b}} ||| {{t}}"
     "{% elif l == 2 %}{{c}} ||| {{t}}{% else %}{{d}} ||| {{t}}{% endif %}", None,
     "a / b / c / d", ["a", "b", "c", "d"]),
    ("Is it {% if l == 0 %}{{a}}{% elif l == 1 %}{{b}}{% elif l == 2 %}{{c}}{% endif %}? ||| {{t}}",
     None, "Is it a / b / c ?", ["a", "b", "l", "c"]),
    ("{% for f in facts %}{{f | lower}}{% endfor %} {{ ', '.join(answer_choices) }}: "
     "{{answers.text}} ||| {{label}}", "a ||| b",
     "facts a, b: answers.text\nAnswers: a, b", ["facts", "answers"]),
    ("{% set x = premise %}Say {{'it'}}: {{x[0] | upper}}{{x[1:]}} {{premise}} ||| {{target}}",
     None, "Say it: premise premise", ["premise"])])
def test_the_instruction_is_the_template_with_names_for_fields(jinja, choices, text, fields):
    """And the fields are those that the input shows: what only the target uses or what only decides
    whether the template applies, the label above all, is not among them."""
    template = Template("d", "t", jinja, choices)
    assert " ".join(template.text.split()) == " ".join(text.split())
    assert fields_of(template) == fields


@pytest.mark.parametrize("jinja, choices, fields", [
    ("{{dialogue[:-1]}} What next? ||| {{dialogue[-1]}}", None, None),
    ("{{question}} {{table}} ||| {{table | length}}", None, None),
    ("{{q}} {{answer_choices | join(', ')}} ||| {{answer_choices[3]}}",
     "{{w1}} ||| {{w2}} ||| {{w3}} ||| {{right}}", None),
    ("{{q}} {{answer_choices | join(', ')}} ||| {{answer_choices[label]}}", "{{c1}} ||| {{c2}}",
     ["q", "c1", "c2"]),
    ("Is it {{options[0]}}? {{q}} ||| {{answer}}", None, None),
    ("{{fact[1:]}} ||| {{answer}}", None, None),
    ("{{options[0]}} or {{options[1]}}? ||| {{answer_choices[label]}}",
     "{{options | join('|||')}}", ["options"]),
    ("{% set i = range(3) | choice %}{{q}} {{ [a, b, c][i] }}? ||| "
     "{% if i == label %}Yes{% else %}No{% endif %}", None, None),
    ("{{ ['Say', 'Tell'] | choice }} {{q}} ||| {{answer}}", None, ["q"]),
    ("{% if answers %}{{q}} ||| {{answers | choice}}{% endif %}", None, ["q"]),
    ("{{a}} or {{b}}? ||| {% if answer == '1' %}{{a}}{% else %}{{b}}{% endif %}", None,
     ["a", "b"])])
def test_fields_that_tell_more_or_less_than_the_prompt_are_not_read(jinja, choices, fields):
    """None: the student reads the prompt. Else what is shown whole, and nothing that names the
    answer."""
    assert fields_of(Template("d", "t", jinja, choices)) == fields


# ----------------------------------------------------------------------------------------- the list

def listed_names(section: dict) -> list[tuple[str, str]]:
    """(data set, template) of everything in one of these: {data set: {fields: [templates]}}."""
    return [(dataset, name) for dataset, groups in section.items()
            for found in groups.values() for name in found]


def prompted_names() -> dict:
    """{(data set, template) whose prompt is read: the reason in the file}."""
    return {(dataset, name): reason for reason, datasets in LISTED["prompt"].items()
            for dataset, found in datasets.items() for name in found}


def test_every_template_is_listed_once_and_one_that_is_not_is_read_as_its_prompt():
    read, prompted = listed_names(LISTED["fields"]), prompted_names()
    found = Counter([*read, *prompted])
    assert max(found.values()) == 1 and {dataset for dataset, _ in found} == DATASETS
    assert sum(dataset in p3.TRAIN for dataset, _ in prompted) == 46
    for dataset, name in read:
        assert Template(dataset, name, "{{any}} ||| {{thing}}").fields
    for dataset, name in [*prompted, ("imdb", "one of my own"), ("my_own", "Reviewer Enjoyment")]:
        assert Template(dataset, name, "{{any}} ||| {{thing}}").fields is None


@real_data
def test_the_list_is_what_the_templates_themselves_say():
    """For every template of T0's data sets, the reason too; other data sets are not listed."""
    found, prompted, seen = load_templates(str(P3 / "templates")), prompted_names(), []
    assert DATASETS <= found.keys()
    for dataset, templates in found.items():
        for template in templates:
            fields, reason = analyse(template)
            key = (dataset, template.name)
            if dataset not in DATASETS:
                assert template.fields is None
                continue
            seen.append(key)
            assert template.fields == (None if reason else fields), key
            assert prompted.get(key) == reason, key
    assert sorted(seen) == sorted([*listed_names(LISTED["fields"]), *prompted])


@real_data
def test_no_students_fields_name_the_answer_in_the_real_templates():
    """Worked out by hand for the templates at risk; T0's evaluation templates all have fields,
    never the label's."""
    found = load_templates(str(P3 / "templates"))
    reads_prompt = Counter(t.dataset for dataset in p3.TRAIN for t in found[dataset]
                           if t.fields is None)
    assert reads_prompt == {
        "common_gen": 2, "dream": 2, "duorc/ParaphraseRC": 2, "duorc/SelfRC": 2, "multi_news": 1,
        "qasc": 8, "quartz": 8, "sciq": 3, "social_i_qa": 1, "wiki_bio": 4, "wiki_hop/original": 9,
        "wiqa": 4}
    for dataset, never in {
            "ropes": "answers", "kilt_tasks/hotpotqa": "output", "sciq": "correct_answer",
            "imdb": "label", "quail": "correct_answer_id", "quoref": "answers",
            "glue/mrpc": "label", "xsum": "summary", "ag_news": "label"}.items():
        for t in found[dataset]:
            assert "enerat" in t.name or never not in (fields_of(t) or []), dataset
    for dataset in set(p3.TEST.values()):
        for t in found[dataset]:
            if t.for_evaluation:
                assert t.fields
                assert not {"label", "answer", "answer_right_ending", "idx"} & set(t.fields)
