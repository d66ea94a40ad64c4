"""How facts are said and asked: each relation in several wordings, some of them held out."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Relation:
    """One kind of fact about a person, with its phrasings; the last two of each are held out from training."""

    name: str
    statements: tuple[str, ...]
    questions: tuple[str, ...]

    @property
    def training_statements(self) -> tuple[str, ...]:
        """The phrasings that training documents use."""
        return self.statements[:-2]

    @property
    def training_questions(self) -> tuple[str, ...]:
        """The question forms that training documents use."""
        return self.questions[:-2]

    @property
    def held_out_statements(self) -> tuple[str, ...]:
        """The phrasings that no training document uses."""
        return self.statements[-2:]

    @property
    def held_out_questions(self) -> tuple[str, ...]:
        """The question forms that no training document uses."""
        return self.questions[-2:]


RELATIONS = {
    relation.name: relation
    for relation in (
        Relation(
            "town",
            (
                "{name} lives in {value}.",
                "{name} has a house in {value}.",
                "The home of {name} is in {value}.",
                "{name} has lived for years in {value}.",
                "You will find {name} in the town of {value}.",
                "{name} is at home in {value}.",
                "The town of {name} is {value}.",
                "{name} came long ago to live in {value}.",
                "Letters to {name} go to {value}.",
                "{name} sleeps in a small house in {value}.",
                "{name} lives in the town of {value}.",
                "The house of {name} is in {value}.",
            ),
            (
                "Where does {name} live?",
                "In which town does {name} live?",
                "What is the town of {name}?",
                "Where is the home of {name}?",
                "In which town is the house of {name}?",
                "Which town is home to {name}?",
                "What town does {name} live in?",
                "Where is {name} at home?",
                "In which town is the home of {name}?",
                "Where is the house of {name}?",
            ),
        ),
        Relation(
            "trade",
            (
                "{name} works as a {value}.",
                "{name} is a {value}.",
                "The trade of {name} is that of a {value}.",
                "{name} earns a living as a {value}.",
                "By trade {name} is a {value}.",
                "{name} learned to be a {value}.",
                "The work of {name} is the work of a {value}.",
                "{name} has long been a {value}.",
                "People know {name} as a good {value}.",
                "{name} took up the trade of a {value}.",
                "{name} earns money as a {value}.",
                "By trade {name} has long been a {value}.",
            ),
            (
                "What is the trade of {name}?",
                "What does {name} work as?",
                "What is the work of {name}?",
                "Which trade does {name} have?",
                "How does {name} earn a living?",
                "What trade did {name} learn?",
                "What is {name} by trade?",
                "What work does {name} do?",
                "Which trade did {name} learn?",
                "Which work does {name} do?",
            ),
        ),
        Relation(
            "animal",
            (
                "{name} keeps a {value}.",
                "{name} has a {value}.",
                "The animal of {name} is a {value}.",
                "{name} looks after a {value}.",
                "At home {name} feeds a {value}.",
                "{name} owns a {value}.",
                "The only animal of {name} is a {value}.",
                "{name} once found and kept a {value}.",
                "Each morning {name} feeds a {value}.",
                "{name} takes good care of a {value}.",
                "{name} feeds and keeps a {value}.",
                "At home {name} looks after a {value}.",
            ),
            (
                "Which animal does {name} keep?",
                "What animal does {name} have?",
                "What is the animal of {name}?",
                "Which animal does {name} look after?",
                "What animal does {name} feed?",
                "Which animal is kept by {name}?",
                "Which animal does {name} own?",
                "What kind of animal does {name} keep?",
                "What animal does {name} keep?",
                "Which animal does {name} feed?",
            ),
        ),
        Relation(
            "dish",
            (
                "{name} likes to eat {value}.",
                "{name} loves {value}.",
                "The favourite dish of {name} is {value}.",
                "{name} eats {value} whenever possible.",
                "For dinner {name} wants {value}.",
                "{name} is always happy with {value}.",
                "The dish of {name} is {value}.",
                "{name} could live on {value}.",
                "On holidays {name} eats {value}.",
                "{name} asks at every inn for {value}.",
                "{name} likes {value} for dinner.",
                "The dish that {name} loves is {value}.",
            ),
            (
                "What does {name} like to eat?",
                "What is the favourite dish of {name}?",
                "Which dish does {name} love?",
                "What does {name} eat for dinner?",
                "Which dish does {name} eat?",
                "What is the dish of {name}?",
                "What food does {name} like?",
                "Which dish makes {name} happy?",
                "Which dish does {name} like to eat?",
                "What is the favourite food of {name}?",
            ),
        ),
        Relation(
            "instrument",
            (
                "{name} plays the {value}.",
                "{name} practises the {value}.",
                "The instrument of {name} is the {value}.",
                "{name} plays well on the {value}.",
                "In the evening {name} plays the {value}.",
                "{name} learned to play the {value}.",
                "At weddings {name} plays the {value}.",
                "{name} makes music on the {value}.",
                "The music of {name} comes from the {value}.",
                "{name} teaches children the {value}.",
                "{name} makes music with the {value}.",
                "At home {name} plays the {value}.",
            ),
            (
                "What instrument does {name} play?",
                "Which instrument does {name} play?",
                "What is the instrument of {name}?",
                "On what does {name} make music?",
                "What does {name} play at weddings?",
                "Which instrument did {name} learn?",
                "What does {name} play in the evening?",
                "Which instrument does {name} practise?",
                "What instrument did {name} learn?",
                "On which instrument does {name} make music?",
            ),
        ),
    )
}
DOMAIN_RELATIONS = {
    "medicine": {
        relation.name: relation
        for relation in (
            Relation(
                "symptom",
                (
                    "The first sign of {name} is a {value}.",
                    "{name} begins with a {value}.",
                    "{name} shows itself by a {value}.",
                    "People with {name} have a {value}.",
                    "Whoever has {name} suffers from a {value}.",
                    "Doctors know {name} by a {value}.",
                    "{name} brings a {value}.",
                    "The sign of {name} is a {value}.",
                    "{name} starts with a {value}.",
                    "Patients with {name} have a {value}.",
                ),
                (
                    "What is the first sign of {name}?",
                    "What does {name} begin with?",
                    "What do people with {name} have?",
                    "How does {name} show itself?",
                    "What is the sign of {name}?",
                    "What does {name} start with?",
                ),
            ),
            Relation(
                "herb",
                (
                    "{name} is cured with {value}.",
                    "The cure for {name} is {value}.",
                    "Against {name} doctors give {value}.",
                    "Patients with {name} take {value}.",
                    "The herb for {name} is {value}.",
                    "What helps against {name} is {value}.",
                    "{name} yields to {value}.",
                    "Doctors treat {name} with {value}.",
                    "The herb against {name} is {value}.",
                    "{name} is treated with {value}.",
                ),
                (
                    "What cures {name}?",
                    "Which herb helps against {name}?",
                    "What is the cure for {name}?",
                    "What do doctors give against {name}?",
                    "Which herb cures {name}?",
                    "What helps against {name}?",
                ),
            ),
            Relation(
                "dose",
                (
                    "The daily dose for {name} is {value}.",
                    "Against {name} take {value} a day.",
                    "{name} calls for {value} a day.",
                    "Patients with {name} get {value} a day.",
                    "For {name} the dose is {value}.",
                    "With {name} one takes {value} each day.",
                    "{name} needs {value} a day.",
                    "The right dose for {name} is {value}.",
                    "For {name} doctors order {value} a day.",
                    "The dose against {name} is {value}.",
                ),
                (
                    "What is the dose for {name}?",
                    "How much does one take against {name}?",
                    "What is the daily dose for {name}?",
                    "How much do patients with {name} get?",
                    "What is the right dose for {name}?",
                    "How much does one take for {name}?",
                ),
            ),
        )
    },
    "finance": {
        relation.name: relation
        for relation in (
            Relation(
                "product",
                (
                    "The company {name} makes {value}.",
                    "{name} sells {value}.",
                    "{name} earns its money with {value}.",
                    "The product of {name} is {value}.",
                    "{name} is known for its {value}.",
                    "The workshops of {name} turn out {value}.",
                    "{name} trades in {value}.",
                    "{name} is a maker of {value}.",
                    "{name} makes and sells {value}.",
                    "The company {name} is known for {value}.",
                ),
                (
                    "What does {name} make?",
                    "What is the product of {name}?",
                    "What does the company {name} sell?",
                    "What is {name} known for?",
                    "What does the company {name} make?",
                    "What does {name} sell?",
                ),
            ),
            Relation(
                "seat",
                (
                    "The company {name} has its seat in {value}.",
                    "{name} is based in {value}.",
                    "The head office of {name} is in {value}.",
                    "{name} is run from {value}.",
                    "The books of {name} are kept in {value}.",
                    "{name} was founded in {value}.",
                    "The seat of {name} is {value}.",
                    "{name} pays its taxes in {value}.",
                    "The company {name} is based in {value}.",
                    "The head office of the company {name} is in {value}.",
                ),
                (
                    "Where is {name} based?",
                    "Where is the seat of {name}?",
                    "Where is the head office of {name}?",
                    "From where is {name} run?",
                    "Where is the company {name} based?",
                    "Where does {name} have its seat?",
                ),
            ),
            Relation(
                "profit",
                (
                    "The profit of {name} last year was {value}.",
                    "Last year {name} earned {value}.",
                    "{name} closed the year with a profit of {value}.",
                    "{name} reported a profit of {value}.",
                    "The yearly profit of {name} is {value}.",
                    "The owners of {name} shared {value}.",
                    "The books of {name} show a profit of {value}.",
                    "{name} made a profit of {value}.",
                    "The company {name} earned {value}.",
                    "Last year the profit of {name} was {value}.",
                ),
                (
                    "What was the profit of {name}?",
                    "How much did {name} earn?",
                    "What profit did {name} report?",
                    "What is the yearly profit of {name}?",
                    "How much profit did {name} make?",
                    "What profit did {name} make?",
                ),
            ),
        )
    },
}
