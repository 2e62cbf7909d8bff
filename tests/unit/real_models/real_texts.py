"""What real models are asked, and what they read."""

QUESTIONS = (
    "What is the capital of France?",
    "Name three fruits.",
    "Why is the sky blue?",
    "Write a short poem about the sea.",
    "How do I boil an egg?",
    "Translate 'good morning' into Spanish.",
    "What is 17 plus 25?",
    "Who wrote Romeo and Juliet?",
    "Give me a synonym for 'happy'.",
    "Explain gravity to a child.",
    "List the days of the week.",
    "What does a compiler do?",
    "Is a tomato a fruit or a vegetable?",
    "Write a Python function that adds two numbers.",
    "How many legs does a spider have?",
    "What should I pack for a trip to the beach?",
    "Finish the sentence: The early bird",
    "What is the opposite of cold?",
    "Tell me a fact about the moon.",
    "Summarise in one line: cats sleep most of the day and hunt at dusk.",
)

PARAGRAPH = (
    "The lighthouse stood at the end of a narrow spit of land, and for more than a hundred years it had warned ships "
    "away from the rocks below. Its keeper, an old man named Thomas, climbed the stairs every evening to light the "
    "lamp, and every morning he climbed them again to put it out. He had few visitors. A boat brought food and letters "
    "twice a month when the weather allowed it, and in summer some children from the village walked out along the "
    "beach to look at the seals. When the government decided in 1962 that the light should be run by electricity, "
    "Thomas was asked to stay on for another year to show the engineers how everything worked."
)

ODD_TEXTS = (
    "  two leading spaces, a tab\tand lines\n\n\nthree of them\r\n",
    "naïve café, русский, 日本語, हिन्दी",
    "def f(x):\n    return {'a': [x, -x]}  # ok?\n",
    "a" * 50 + " " * 17 + "." * 9,
)
