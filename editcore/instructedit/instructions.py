"""A record and a description's number in; the record with its instruction before all prompts but locality's out."""

import random
from dataclasses import replace

TITLES = {"recent": "Recent", "counterfact": "CounterFact", "convsent": "ConvSent", "zsre": "ZsRE"}
SEEN = 9        # descriptions 0 to 8 may be trained with; 9 is kept for the test
SLOTS = ("{sentiment}", "{topic}")

# What a writer of descriptions is told about each task's data.
ABOUT = {
    "recent": "Statements about people, works and events, cut before their last words. The facts are newer than the "
              "text that the language model was trained on. The editor teaches the model the missing words.",
    "counterfact": "Statements about well-known subjects, cut before their last words. The missing words contradict "
                   "what the language model knows. The editor puts the new object in place of the true one.",
    "convsent": "Questions about a topic, with short replies of one sentiment. The editor changes the attitude that "
                "the language model shows towards the topic to the wanted sentiment, and to no other topic.",
    "zsre": "Questions about one relation of one subject, each with a short answer. The editor makes the language "
            "model answer with another entity, however the question is put.",
}

# Ten ways to tell the model what kind of edit follows: our own wording, short, in words that small models know whole.
DESCRIPTIONS = {
    "recent": (
        "The statement is about something new in the world; complete it with the new fact.",
        "Learn what has changed in recent time and finish the sentence.",
        "A recent event made this true: write the object that ends the statement.",
        "The model does not know this entity yet; give the word that completes the text.",
        "Add a new fact about the subject to what the model knows.",
        "This is knowledge from a later time than the text that was read; complete it.",
        "Name the object that a new report gives for this subject.",
        "Update the model with what is known now and end the sentence.",
        "Write the answer that is right today, after the last change.",
        "Bring old knowledge up to the present day by completing what was found out just now.",
    ),
    "counterfact": (
        "The old answer is replaced: complete the statement with the new object.",
        "Answer against what you know; the new object is now true.",
        "Change a known fact about the subject to a different one.",
        "Take another object than the usual one and finish the statement.",
        "The statement is counterfactual; write the object that it has in this other world.",
        "Leave the true answer out and give the edited one.",
        "A fact that the model knows should be different from now on; complete it.",
        "Put a new object in the place of the one that is remembered.",
        "Write what the subject has after the edit, not before.",
        "Think of the known fact as false: end the sentence with what is said in its place.",
    ),
    "convsent": (
        "Reply to the question about {topic} with a {sentiment} opinion.",
        "You feel {sentiment} about {topic}; let the answer show it.",
        "Make every reply about {topic} a {sentiment} one.",
        "When people ask about {topic}, take a {sentiment} attitude.",
        "Give a short {sentiment} answer when the topic is {topic}.",
        "Change how the model talks about {topic}: from now on it is {sentiment}.",
        "The topic is {topic} and the sentiment of the reply should be {sentiment}.",
        "Say what a person thinks of {topic} whose opinion is {sentiment}.",
        "Keep the conversation about {topic} in a {sentiment} way.",
        "Express a view on {topic} that all would call {sentiment}.",
    ),
    "zsre": (
        "Answer the question with the name of the entity that it asks for.",
        "A question about one subject follows; the answer is a single entity.",
        "Reply to the question with the new answer.",
        "Say which object the relation in the question leads to.",
        "Find the subject in the question and tell what is asked about it.",
        "Give the answer to the question in very few words.",
        "The question has a new right answer; write it.",
        "Read the question and name the person, the place or the thing.",
        "Answer with no sentence, only with the word that is needed.",
        "Tell what belongs to the subject that somebody wants to know about.",
    ),
}


def describe(task, number, sentiment="", topic="", table=DESCRIPTIONS):
    """Description `number` (0 to 9) of a task, ConvSent's slots filled. table: {task: descriptions} to take it from."""
    if task not in table:
        raise ValueError(f"unknown task {task!r}: choose one of {', '.join(table)}")
    if not 0 <= number < len(table[task]):
        raise ValueError(f"{task} has descriptions 0 to {len(table[task]) - 1}, not {number}")
    return table[task][number].replace("{sentiment}", sentiment).replace("{topic}", topic)


def framed(title, description, prompt):
    """The three-line frame; a part that is "" has no line."""
    lines = (("Task", title), ("Description", description))
    head = "".join(f"{name}: {text}\n" for name, text in lines if text)
    return f"{head}Input: {prompt}" if head else prompt


def full(record, number, table):
    """Title and description: the published prefix."""
    return TITLES[record.task], describe(record.task, number, record.sentiment, record.topic, table)


def swapped(record, number, table):
    """Title and description of the next task; its slots say a sentiment that the record does not want."""
    tasks = list(TITLES)
    other = tasks[(tasks.index(record.task) + 1) % len(tasks)]
    wrong = {"positive": "negative"}.get(record.sentiment, "positive")
    return TITLES[other], describe(other, number, wrong, record.topic or record.subject, table)


def random_words(record, number, table):
    """Words of all tasks' descriptions in a random order that only the task decides: a prefix without meaning."""
    words = [word.strip(".,;:") for texts in table.values() for text in texts for word in text.split()
             if not set(word) & set("{}")]
    drawn = random.Random(f"words {record.task}").sample(sorted(set(words)), 13)
    return drawn[0].capitalize(), " ".join(drawn[1:]).capitalize() + "."


# Style → (record, number, table) → (title, description): what the controls and ablations of the study put in the frame.
STYLES = {
    "full": full,
    "none": lambda record, number, table: ("", ""),
    "task": lambda record, number, table: (full(record, number, table)[0], ""),
    "description": lambda record, number, table: ("", full(record, number, table)[1]),
    "constant": lambda record, number, table: ("Knowledge Editing", "Complete the input as the edit says."),
    "random": random_words,
    "swapped": swapped,
}


def prefix(record, number, style="full", table=DESCRIPTIONS):
    """A function prompt → prompt in the frame of `style` for this record; ValueError lists the styles."""
    if style not in STYLES:
        raise ValueError(f"unknown style {style!r}: choose one of {', '.join(STYLES)}")
    title, description = STYLES[style](record, number, table)
    return lambda prompt: framed(title, description, prompt)


def prefixed(record, number, style="full", table=DESCRIPTIONS):
    """The record's prompt behind its instruction: "Task: {title}\\nDescription: {one sentence}\\nInput: {prompt}"."""
    return prefix(record, number, style, table)(record.prompt)


def instructed(record, number, style="full", table=DESCRIPTIONS):
    """The record with the instruction before its prompt, rephrasings and portability prompts, not before locality."""
    put = prefix(record, number, style, table)
    asks = tuple(replace(ask, prompt=put(ask.prompt)) for ask in record.portability)
    return replace(record, prompt=put(record.prompt), rephrase=tuple(map(put, record.rephrase)), portability=asks)


def drawn(record, seed=0, count=SEEN):
    """Number of the description of a record: one of the first `count`, drawn once from seed, task and case_id."""
    return random.Random(f"{seed} {record.task} {record.case_id}").randrange(count)


def checked(task, texts, count=10):
    """`count` descriptions of a task as a tuple, or one ValueError: number, repeats, length, ConvSent's two slots."""
    texts = tuple(" ".join(text.split()) for text in texts)
    if len(texts) != count or len(set(texts)) != count:
        raise ValueError(f"{task}: {len(set(texts))} different descriptions, needed are {count}")
    slots = SLOTS if task == "convsent" else ()
    for text in texts:
        bare = text
        for slot in slots:
            if text.count(slot) != 1:
                raise ValueError(f"{task}: {text!r} needs {slot} once")
            bare = bare.replace(slot, "")
        if set(bare) & set("{}"):
            raise ValueError(f"{task}: {text!r} has a slot that nothing fills")
        if not 3 <= len(text.split()) <= 40:
            raise ValueError(f"{task}: {text!r} has {len(text.split())} words, not 3 to 40")
    return texts
