"""Word a fact as a stub to complete or as a question, for the editing tasks."""

import re
import tomllib
from collections import defaultdict

from data.world.make import records, tables

# Relations whose answers hang together: an edit of one may change the other.
TOGETHER = (
    {"capital", "country_of_capital", "continent", "city_country", "state_capital", "us_city",
     "state_of_capital", "city_of_landmark", "museum_city", "airport_city", "club_city",
     "landmark_country", "river_continent", "mountain_continent", "lake_continent",
     "island_country", "university_state", "people_place"},
    {"animal_class", "plant_kind", "food_kind", "substance_kind", "thing_kind", "instance",
     "sky_kind", "dog_breed", "widely", "prestigious", "made_of", "habitat", "language_family",
     "element_group", "dish_country"},
    {"profession", "sport", "instrument", "leader_country", "mother_tongue"},
    {"company_country", "band_country", "agency_country", "maker", "founder"},
    {"language", "official_language_of", "language_family"},
    {"currency", "currency_of"},
    {"sport", "team_sport", "sport_object"},
    {"author", "composer", "director", "painter", "character_creator"},
    {"unit_of", "measured_by", "instrument_kind"},
    {"inventor", "discoverer", "founder"},
)
INVERTED = re.compile(r"\b(is|was|does|has) ((?:the )?\{\})")
# First words after which the last word is no family name.
TITLES = {"King", "Queen", "Pope", "Saint", "Emperor", "Prince", "Princess", "Sir", "Lord",
          "Mother", "Lady", "Mao", "Deng", "Kim", "Ho", "Sun", "Chiang", "Zhou", "Xi", "Lao",
          "Hu", "Li", "Lang", "Kenny", "Moon", "Park", "Duke", "Czar", "Tsar", "Sultan", "Jiang",
          "Juan", "Meles"}
VERBS = {"is": "are", "was": "were", "does": "do", "has": "have"}
PEOPLE = {"mother_tongue", "profession", "sport", "instrument", "leader_country"}
DRESSES = ("{}", "{}", "{}", "Q: {} A:", "Question: {} Answer:")


def groups():
    """{relation: the groups that it is in}; each relation is in one of its own too."""
    found = defaultdict(set)
    for number, names in enumerate(TOGETHER):
        for name in names:
            found[name].add(number)
    return {name: found[name] | {name} for name in tables.relations()}


GROUPS = groups()


def aliases():
    """{subject: other names} of aliases.txt."""
    lines = (tables.TABLES / "aliases.txt").read_text("utf-8").splitlines()
    pairs = [line.split(": ", 1) for line in lines]
    return {subject: names.split("; ") for subject, names in pairs}


def pick(items, *parts):
    """One of the items, drawn by a hash of the texts."""
    return items[records.draw(*parts) % len(items)]


class Asking:
    """The wordings of facts; every draw is by a hash of what it is for."""

    def __init__(self, world):
        """Read the questions and the other names of subjects beside the world's tables."""
        self.world = world
        with open(tables.TABLES / "questions.toml", "rb") as file:
            self.questions = tomllib.load(file)
        self.aliases = aliases()
        self.families = defaultdict(set)        # last word of a subject -> the subjects
        for _, subject in world.objects:
            self.families[subject.split()[-1]].add(subject)

    def template(self, fact, share):
        """A wording with {}: in `share` percent of draws a question, else a stub.

        The stub is one that the model completes rightly if there is one.
        """
        name = fact.relation.name
        if records.draw("question", name, fact.subject) % 100 < share:
            template = pick(self.questions[name], "which question", name, fact.subject)
            return pick(DRESSES, "dress", name, fact.subject).replace("{}", template)
        hits = self.world.measured.get((name, fact.subject), ())
        stubs = [stub for stub, hit in zip(fact.relation.edit, hits) if hit]
        return pick(stubs or fact.relation.edit, "stub", name, fact.subject)

    def named(self, template, subject):
        """(prompt, subject as it is written there)."""
        if records.bare(subject) in self.world.plural:
            template = INVERTED.sub(lambda match: f"{VERBS[match[1]]} {match[2]}", template)
        template, name = records.named(self.world, template, subject)
        return template.replace("{}", name), name

    def prompt(self, fact, share):
        """The fact in one of its wordings."""
        return self.named(self.template(fact, share), fact.subject)[0]

    def question(self, fact):
        """One of the questions on the fact."""
        name = fact.relation.name
        template = pick(self.questions[name], "a question", name, fact.subject)
        return self.named(template, fact.subject)[0]

    def rephrase(self, fact, template):
        """The fact in another wording than the template."""
        name = fact.relation.name
        every = [*fact.relation.prompts, *self.questions[name]]
        others = [other for other in every if other not in template]
        return self.named(pick(others, "rephrase", name, fact.subject), fact.subject)[0]

    def alias(self, fact):
        """Another name of the subject: of the table, or a person's family name; "" for none."""
        if fact.subject in self.aliases:
            return pick(self.aliases[fact.subject], "alias", fact.subject)
        is_name = re.fullmatch(r"[A-Z][a-z]+ [A-Z][a-z]{3,}", fact.subject)
        if fact.relation.name in PEOPLE and is_name \
                and fact.subject.split()[0] not in TITLES:
            last = fact.subject.split()[-1]
            return last if len(self.families[last]) == 1 else ""
        return ""

    def alias_prompt(self, fact, name):
        """A stub on the fact in which the subject has another name."""
        stub = pick(fact.relation.edit, "alias stub", fact.relation.name, fact.subject)
        return self.named(stub, name)[0]
