"""Do the instructions of `trine eval -t ifeval` judge as those of lm-evaluation-harness?

    pip install lm_eval[ifeval]==0.4.13
    cargo build --release -p trine-eval --example follow
    python scripts/interop/ifeval_agreement.py ifeval_input_data.jsonl \\
        [--follow target/release/examples/follow] [--answers 8] [--seed 0]

Every item of the file is answered several times, and every answer is judged by both: strictly and
loosely, instruction by instruction. Answers are made here, of sentences of the prompts themselves and
of what tests the edges of the checks: bullets of both kinds, highlights, dividers, titles, quotation
marks, code fences, abbreviations, ellipses, initials, numbers, words in capitals, contractions, other
languages, prefaces and postscripts, and whatever the instructions of the item ask for, so that about
half of all judgements are yes. Where NLTK's `punkt_tab` is not at hand, NLTK downloads it.

Prints how many judgements agree for each instruction, and the first that do not. Sentences are split by
a word list of our own instead of Punkt's trained model, so `number_sentences` and
`capital_word_frequency` may differ; anything else is an error and exits with 1. The language detector
of the harness is random; here it has its seed 0, as ours always has. A character that is no letter is
replaced by a random letter in the harness' `letter_frequency`; such items are left out.
"""

import argparse
import collections
import json
import random
import re
import subprocess
import sys

import langdetect
from lm_eval.tasks.ifeval import instructions_registry
from lm_eval.tasks.ifeval.utils import (
    InputExample,
    test_instruction_following_loose,
    test_instruction_following_strict,
)

langdetect.DetectorFactory.seed = 0

# What may differ, and why.
EXPLAINED = {
    "length_constraints:number_sentences": "where sentences end",
    "change_case:capital_word_frequency": "where sentences end",
}

EDGES = """
Mr. Smith met Dr. J. R. Jones at 5 p.m. on Jan. 3 in Washington, D.C. He left.
Well... He waited... and waited. Then... nothing! Really?! "Yes!!!" she said.
The U.S. team, e.g. the U.K. one, i.e. theirs, won 3.5 to 2.25, etc. Good.
1. Apples are red. 2. Pears are not.
She paid $1,000.50 (too much). "It's fine," he said. 'Tis so -- CANNOT be; DON'T!
NASA AND ESA CAN'T AGREE. I AM ON A HIGH-SPEED TRAIN.
Vitamin C. It helps. Plan B was better. See p. 5 and vol. 2 of the book.
She said: “Go.” ‘Why?’ he asked... "Because." (No reason.) [See above.]
He works for Acme Inc. They pay well. Acme Corp. grew. Apples fell.
at the end of a line
without a full stop
""".strip().split("\n")

LANGUAGES = {
    "de": "Am Morgen war der Hafen still, und niemand sprach ein Wort. Die Boote lagen am Ufer.",
    "it": "La mattina il porto era tranquillo e nessuno parlava. Le barche erano a riva.",
    "pt": "De manhã o porto estava calmo e ninguém falava. Os barcos estavam na margem.",
    "fi": "Aamulla satama oli hiljainen, eikä kukaan puhunut. Veneet olivat rannassa.",
    "vi": "Buổi sáng bến cảng yên tĩnh và không ai nói gì. Những chiếc thuyền nằm trên bờ.",
    "sw": "Bandari ilikuwa kimya asubuhi, na hakuna mtu aliyezungumza. Boti zilikuwa ufukweni.",
    "ru": "Утром в гавани было тихо, и никто не говорил. Лодки лежали на берегу.",
    "bg": "Сутринта пристанището беше тихо и никой не говореше. Лодките бяха на брега.",
    "ar": "كان الميناء هادئا في الصباح ولم يتكلم أحد. كانت القوارب على الشاطئ.",
    "fa": "صبح بندر آرام بود و هیچ کس حرف نمی‌زد. قایق‌ها در ساحل بودند.",
    "ur": "صبح بندرگاہ خاموش تھی اور کوئی نہیں بولا۔ کشتیاں کنارے پر تھیں۔",
    "hi": "सुबह बंदरगाह शांत था और कोई नहीं बोला। नावें किनारे पर थीं।",
    "mr": "सकाळी बंदर शांत होते आणि कोणीही बोलले नाही. होड्या किनाऱ्यावर होत्या.",
    "ne": "बिहान बन्दरगाह शान्त थियो र कोही बोलेन। डुङ्गाहरू किनारमा थिए।",
    "bn": "সকালে বন্দর শান্ত ছিল এবং কেউ কথা বলেনি। নৌকাগুলো তীরে ছিল।",
    "pa": "ਸਵੇਰੇ ਬੰਦਰਗਾਹ ਸ਼ਾਂਤ ਸੀ ਅਤੇ ਕੋਈ ਨਹੀਂ ਬੋਲਿਆ। ਕਿਸ਼ਤੀਆਂ ਕੰਢੇ ਤੇ ਸਨ।",
    "gu": "સવારે બંદર શાંત હતું અને કોઈ બોલ્યું નહીં. હોડીઓ કિનારે હતી.",
    "ta": "காலையில் துறைமுகம் அமைதியாக இருந்தது, யாரும் பேசவில்லை.",
    "te": "ఉదయం ఓడరేవు ప్రశాంతంగా ఉంది మరియు ఎవరూ మాట్లాడలేదు.",
    "kn": "ಬೆಳಿಗ್ಗೆ ಬಂದರು ಶಾಂತವಾಗಿತ್ತು ಮತ್ತು ಯಾರೂ ಮಾತನಾಡಲಿಲ್ಲ.",
    "th": "ตอนเช้าท่าเรือเงียบสงบและไม่มีใครพูดอะไร",
    "ko": "아침에 항구는 조용했고 아무도 말하지 않았다. 배들은 물가에 있었다.",
    "ja": "朝、港は静かで、誰も話さなかった。",
}


def sentences(records):
    """What answers are made of: sentences of all prompts, and edges."""
    found = set()
    for record in records:
        found.update(s.strip() for s in re.split(r"(?<=[.?!])\s+|\n", record["prompt"]))
    return sorted(s for s in found if 3 < len(s) < 300) + EDGES * 12


def obeyed(name, arguments, text, rng):
    """The text, made to follow an instruction more or less."""
    about = lambda n: max(0, n + rng.choice([-1, 0, 0, 1]))
    n = about(next((v for v in arguments.values() if isinstance(v, int)), 1))
    lines = text.split("\n")
    match name.split(":")[1]:
        case "existence":
            return text + " " + " ".join(rng.choice([w, w.upper(), w + "s"]) for w in arguments["keywords"])
        case "frequency":
            word = arguments["keyword"]
            return text + "".join(f" {rng.choice([word, word.title(), 'x' + word])}," for _ in range(n))
        case "forbidden_words":
            words = arguments["forbidden_words"]
            for word in words:
                text = re.sub(word, "-", text, flags=re.I)
            return text + rng.choice(["", " " + words[0] + "ish", " " + words[-1].upper() + "."])
        case "letter_frequency":
            letter = arguments["letter"]
            return text.replace(letter, "").replace(letter.upper(), "") + letter * n
        case "response_language":
            own = LANGUAGES.get(arguments["language"], "")
            return rng.choice([own, own, own + "\n" + text, rng.choice(list(LANGUAGES.values())), "12 + 3", own + " 1. " + own])
        case "number_sentences":
            return " ".join(rng.choice(EDGES + [s for s in lines if s] or EDGES) for _ in range(max(1, n // 2)))
        case "number_paragraphs":
            parts = [rng.choice(lines) for _ in range(max(1, n))]
            return rng.choice(["\n***\n", "***", " *** ", "\n\n***\n\n"]).join(parts) + rng.choice(["", "\n***", "***\n***"])
        case "number_words":
            words = (text + " ").replace(".", ". ").split() or ["a"]
            return " ".join((words * (n // len(words) + 1))[:n])
        case "nth_paragraph_first_word":
            parts = [rng.choice(lines) or "x" for _ in range(about(arguments["num_paragraphs"]))]
            at = arguments["nth_paragraph"] - 1
            if at < len(parts):
                word = arguments["first_word"]
                parts[at] = rng.choice([word, word.title() + ",", '"' + word.upper() + "'s", "a " + word]) + " " + parts[at]
            return "\n\n".join(parts) + rng.choice(["", "\n\n", "\n\n\n"])
        case "number_placeholders":
            return text + "".join(rng.choice(["[name]", " [a b] ", "[]", "[\n]"]) for _ in range(n))
        case "postscript":
            return text + "\n" + rng.choice(["P.S. So", "P.P.S. So", "P.P.S So", "p. s. so", "PS: so", "p.p. s", arguments["postscript_marker"]])
        case "number_bullet_lists":
            bullets = [rng.choice(["* a", "- b", "  * c", "** d **", "*e*", "*", "-", "\n* f"]) for _ in range(n)]
            return rng.choice(lines) + "\n" + "\n".join(bullets)
        case "constrained_response":
            return rng.choice(["My answer is yes.", "My answer is no.", "My answer is maybe", "my answer is yes.", text + " My answer is maybe."])
        case "number_highlighted_sections":
            return text + " ".join(rng.choice(["*a b*", "**c**", "* *", "** **", "***d***", "*e\nf*", "**g*"]) for _ in range(n))
        case "multiple_sections":
            word = arguments["section_spliter"]
            return "\n".join(f"{rng.choice([word, word, word.title(), word.upper()])}{rng.choice([' ', '', '  '])}{i + 1}\n{rng.choice(lines)}" for i in range(n))
        case "json_format":
            body = rng.choice(['{"a": 1}', "[1, 2.5e3, null]", '{"a": "b\\u00e9"}', "{'a': 1}", '{"a": 1,}', '"' + "x" + '"', "tRue", '{"a": "b\nc"}', "1", ""])
            return rng.choice(["", "```json\n", "```JSON\n", "```\n", "```json```", "Here:\n```\n"]) + body + rng.choice(["", "\n```", "```", "\n```\nDone."])
        case "title":
            return rng.choice(["<<A title>>\n", "<< >>", "<<a\nb>>", "<<<b>>>", "<title>"]) + text
        case "two_responses":
            a, b = rng.choice(lines), rng.choice(lines)
            return rng.choice(["", "******"]) + a + rng.choice(["******", "\n******\n", "*****", "*******", "******\n******"]) + b
        case "repeat_prompt":
            said = arguments["prompt_to_repeat"]
            return rng.choice([said, said.upper(), " " + said, "Sure:\n" + said, said[:-1]]) + "\n\n" + text
        case "end_checker":
            return text + rng.choice([" ", "\n", '"']) + rng.choice([str.upper, str])(arguments["end_phrase"]) + rng.choice(["", '"', " ", ".", '"\n'])
        case "capital_word_frequency":
            words = text.split()
            for i in rng.sample(range(len(words)), min(n, len(words))):
                words[i] = words[i].upper()
            return " ".join(words)
        case "english_capital":
            return rng.choice([text.upper(), text.upper(), LANGUAGES["de"].upper(), text.upper() + "a"])
        case "english_lowercase":
            return rng.choice([text.lower(), text.lower(), LANGUAGES["it"].lower(), text.lower() + "A"])
        case "no_comma":
            return text.replace(",", rng.choice(["", "", "،", "、"]))
        case "quotation":
            return rng.choice(['"', '"', "“"]) + text + rng.choice(['"', '"', '" ', '".'])
    raise ValueError(name)


def answer(record, pool, rng):
    text = rng.choice([" ", "\n", "\n\n"]).join(rng.choices(pool, k=rng.randint(1, 12)))
    if rng.random() < 0.03:
        return rng.choice(["", " \n", "...", "*", "\n\n\n", "。"])
    # Later ones have the last word, so the order changes.
    pairs = list(zip(record["instruction_id_list"], record["kwargs"]))
    rng.shuffle(pairs)
    for name, arguments in pairs:
        if rng.random() < 0.85:
            text = obeyed(name, arguments, text, rng)
    if rng.random() < 0.3:
        text = rng.choice(["Sure!\n", "Here it is:\n\n", "**Answer**\n"]) + text
    if rng.random() < 0.2:
        text += rng.choice(["\nAny questions?", "\n\nHope it helps, bye.", "\n"])
    return text


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("items")
    parser.add_argument("--follow", default="target/release/examples/follow")
    parser.add_argument("--answers", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    with open(args.items) as file:
        records = [json.loads(line) for line in file]
    pool = sentences(records)

    asked, theirs = [], []
    for record in records:
        for _ in range(args.answers):
            text = answer(record, pool, rng)
            example = InputExample(record["key"], record["instruction_id_list"], record["prompt"], record["kwargs"])
            strict = test_instruction_following_strict(example, text).follow_instruction_list
            loose = test_instruction_following_loose(example, text).follow_instruction_list
            for name, arguments, *judged in zip(record["instruction_id_list"], record["kwargs"], strict, loose):
                if "letter" in arguments and not arguments["letter"].isalpha():
                    continue
                asked.append({"key": record["key"], "instruction": name, "arguments": arguments, "text": text})
                theirs.append(judged)
    lines = "".join(json.dumps(a) + "\n" for a in asked)
    done = subprocess.run([args.follow], input=lines, stdout=subprocess.PIPE, text=True, check=True)
    ours = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(ours) == len(theirs)

    counts = collections.defaultdict(lambda: [0, 0, 0])
    wrong = 0
    for a, here, there in zip(asked, ours, theirs):
        count = counts[a["instruction"]]
        count[0] += 2
        count[1] += sum(there)
        count[2] += sum(h == t for h, t in zip(here, there))
        if here != there:
            wrong += a["instruction"] not in EXPLAINED
            if count[0] - count[2] <= 8:
                print(f"{a['key']} {a['instruction']} {a['arguments']}: harness {there}, here {here}: {a['text']!r}")
    assert set(counts) == set(instructions_registry.INSTRUCTION_DICT), "an instruction that no item has"
    print("\n| instruction | judgements | of them yes | agree |\n| --- | --- | --- | --- |")
    for name, (judged, yes, agree) in sorted(counts.items()):
        print(f"| {name} | {judged:,} | {yes:,} | {agree:,} |")
    total = [sum(count[i] for count in counts.values()) for i in range(3)]
    print(f"| all | {total[0]:,} | {total[1]:,} | {total[2]:,} |")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
