"""Few-shot prompts: solved items first, the asked one up to its label."""

import pytest

from editcore import fewshot_tasks as tasks


def test_prompts_show_solved_items_and_end_before_the_label():
    item, shot = {"sentence": "so good .", "label": 1}, {"sentence": "so bad .", "label": 0}
    wanted = "Review: so bad .\nSentiment: negative\n\nReview: so good .\nSentiment:"
    assert tasks.render("sst2", item, [shot]) == wanted
    assert tasks.answer("rte", {"label": 0}) == " true", "GLUE's 0 is entailment"
    with pytest.raises(ValueError, match="unknown task"):
        tasks.task("nli")
    with pytest.raises(ValueError, match="no field"):
        tasks.question("mrpc", item)
    with pytest.raises(ValueError, match="label 7"):
        tasks.answer("sst2", {"label": 7})
