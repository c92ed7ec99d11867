"""The 57 subjects of MMLU and the four groups that its authors put them in."""

from __future__ import annotations

__all__ = ["GROUPS", "NON_STEM", "STEM", "SUBJECTS", "groups_of"]

_MEMBERS = {
    "stem": (
        "abstract_algebra anatomy astronomy college_biology college_chemistry college_computer_science "
        "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
        "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
        "high_school_mathematics high_school_physics high_school_statistics machine_learning"
    ),
    "humanities": (
        "formal_logic high_school_european_history high_school_us_history high_school_world_history international_law "
        "jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory professional_law "
        "world_religions"
    ),
    "social_sciences": (
        "econometrics high_school_geography high_school_government_and_politics high_school_macroeconomics "
        "high_school_microeconomics high_school_psychology human_sexuality professional_psychology public_relations "
        "security_studies sociology us_foreign_policy"
    ),
    "other": (
        "business_ethics clinical_knowledge college_medicine global_facts human_aging management marketing "
        "medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology"
    ),
}

STEM = "stem"
NON_STEM = "non_stem"

GROUPS: dict[str, tuple[str, ...]] = {group: tuple(members.split()) for group, members in _MEMBERS.items()}
"""Subjects of each of the four groups."""

SUBJECTS: dict[str, str] = {subject: group for group, members in GROUPS.items() for subject in members}
"""Group of each subject."""


def groups_of(subject: str) -> tuple[str, ...]:
    """The groups whose figures a subject counts in: its own, ``non_stem`` where that is another, and ``mmlu``."""
    group = SUBJECTS[subject]
    return (group, "mmlu") if group == STEM else (group, NON_STEM, "mmlu")
