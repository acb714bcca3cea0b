"""What happens in a hospital in a day: each function is one story, told to the systems in its order, and says how its
studies must stand at the end. Many go on beside each other."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta

from tests.arrivals import read, until
from tests.hospital_day import ADC, T2W, WITHIN_S, Day, Visit

Story = Callable[[Day], None]


def _examine(visit: Visit) -> None:
    """Order, patient on the table, images, done."""
    visit.order("NW")
    visit.order("SC", "IP")
    visit.images()
    visit.order("SC", "CM")


# Read


def ordinary(day: Day) -> None:
    """Then the RIS sends the order once more, as new: nothing opens again."""
    visit = day.visit()
    visit.adt("A04")
    _examine(visit)
    visit.until("released")
    visit.adt("A08", replace(visit.person, birth_date=visit.person.birth_date))
    visit.order("NW")


def same_number_at_two_sites(day: Day) -> None:
    """Two persons of one patient number, each at a site of its own."""
    one = day.visit(day.person("SITEA"))
    other = day.visit(day.person("SITEB", one.person.number))
    for visit in (one, other):
        visit.adt("A01")
        visit.order("NW")
    other.images()
    one.images()
    for visit in (one, other):
        visit.order("SC", "CM")


def images_before_the_order(day: Day) -> None:
    """Then the order is cancelled, too late: what was released stays, people have seen it."""
    visit = day.visit()
    visit.images()
    visit.order("NW")
    visit.order("SC", "CM")
    visit.until("released")
    visit.order("CA")


def images_without_an_order(day: Day) -> None:
    """Then the patient is merged into another one, too late."""
    visit = day.visit(is_ordered=False)
    visit.images()
    visit.until("released")
    visit.merge_into(day.person(visit.person.site))


def late_series_that_does_not_matter(day: Day) -> None:
    """Then somebody says over HTTP that the study is there, as a PACS does that waits until it is stable."""
    visit = day.visit()
    _examine(visit)
    visit.until("released")
    image_type = ["ORIGINAL", "PRIMARY", "LOCALIZER"]
    visit.images(visit.like(T2W, 31, SeriesDescription="localizer", ImageType=image_type))
    visit.announce()


def on_hold_and_resumed(day: Day) -> None:
    visit = day.visit()
    visit.order("NW")
    visit.order("HD")
    visit.images()
    visit.until("waiting")
    time.sleep(3)
    assert visit.is_in("waiting")
    visit.order("RL")


def merged_before_and_corrected(day: Day) -> None:
    """The order knows the patient by a number that was merged away; the images have the one that is left."""
    visit = day.visit()
    former = day.person(visit.person.site)
    visit.order("NW", person=former)
    visit.adt("A40", None, f"MRG|{former.number}^^^{former.site}")
    visit.images()
    visit.order("SC", "CM")


def birth_date_corrected_in_time(day: Day) -> None:
    visit = day.visit()
    visit.adt("A04", replace(visit.person, birth_date=visit.person.birth_date + timedelta(days=1)))
    visit.adt("A08")
    _examine(visit)


def late_series_that_matters(day: Day) -> None:
    visit = day.visit()
    visit.expect("released", runs=2, revisions=2)
    _examine(visit)
    visit.until_delivered()
    visit.images(visit.like(T2W, 44))


def everything_twice(day: Day) -> None:
    """Messages again, one control id for two messages, images stored again, the study announced over HTTP as well."""
    visit = day.visit()
    sent = [visit.order("NW"), visit.order("SC", "IP", control_id=f"ONE-{visit.accession}")]
    visit.images()
    sent += [visit.order("SC", "CM", control_id=f"ONE-{visit.accession}")]
    visit.images()
    visit.announce()
    for raw in sent:
        day.send(visit.person.site, raw)
    visit.until("released")
    visit.images()
    visit.announce()


# Held


def cancelled_before_the_images(day: Day) -> None:
    visit = day.visit()
    visit.expect("held", "the order of this study is cancelled")
    visit.order("NW")
    visit.order("CA")
    visit.images()


def cancelled_while_on_hold(day: Day) -> None:
    visit = day.visit()
    visit.expect("held", "the order of this study is cancelled")
    visit.order("NW")
    visit.order("HD")
    visit.images()
    visit.until("waiting")
    visit.order("CA")


def cancelled_during_the_reading(day: Day) -> None:
    visit = day.visit()
    visit.expect("held", "the order of this study is cancelled")
    with day.in_the_middle(visit) as wait:
        _without_completion(visit)
        wait()
        visit.order("CA")
        until(lambda: any(o.status == "cancelled" for o in day.heard.orders_of_study(visit.study_uid)), WITHIN_S)


def merged_before_the_images(day: Day) -> None:
    visit = day.visit()
    visit.expect("held", "was merged into another one (ADT^A40)")
    visit.merge_into(day.person(visit.person.site))
    visit.order("NW")
    visit.images()


def merged_during_the_reading(day: Day) -> None:
    visit = day.visit()
    visit.expect("held", "was merged into another one (ADT^A40)")
    with day.in_the_middle(visit) as wait:
        _without_completion(visit)
        wait()
        visit.merge_into(day.person(visit.person.site))
        until(lambda: day.is_merged(visit.person), WITHIN_S)


def _without_completion(visit: Visit) -> None:
    visit.order("NW")
    visit.order("SC", "IP")
    visit.images()


def birth_date_differs_in_the_ehr(day: Day) -> None:
    """A person looks at it, and puts it away."""
    person = day.person()
    visit = day.visit(person, chart=replace(person, birth_date=person.birth_date + timedelta(days=365)))
    visit.expect("rejected", "the birth date in the images differs from the one in")
    _without_completion(visit)
    visit.until("held")
    visit.decide("reject")
    visit.order("SC", "CM")


def sex_differs_in_a_message(day: Day) -> None:
    """A person looks at it, and releases it."""
    visit = day.visit()
    visit.expect("released", "the sex in the images differs from the one told by HL7", runs=2)
    visit.adt("A08", replace(visit.person, sex="F"))
    _without_completion(visit)
    visit.until("held")
    visit.decide("release")


def same_accession_at_two_sites(day: Day) -> None:
    """The accession number is another person's at the other site: the order that is known is not this study's."""
    one = day.visit(day.person("SITEA"))
    other = day.visit(day.person("SITEB"), one.accession)
    other.expect("held", "the order of this study is another patient's")
    one.order("NW")
    other.order("NW")
    other.images()
    one.images()
    one.order("SC", "CM")


def same_accession_and_number_at_two_sites(day: Day) -> None:
    """Nothing but the issuer tells the persons apart. The second study is released by a person: without the first
    one's order numbers."""
    one = day.visit(day.person("SITEA"))
    other = day.visit(day.person("SITEB", one.person.number), one.accession)
    other.expect("released", "the order of this study is another patient's", runs=2)
    one.order("NW")
    one.images()
    one.order("SC", "CM")
    one.until("released")
    other.images()
    other.until("held")
    other.decide("release")


# Neither


def order_without_images(day: Day) -> None:
    visit = day.visit()
    visit.expect("", "its study was not found so far", runs=0, fetched=False)
    visit.order("NW")


def stays_incomplete(day: Day) -> None:
    visit = day.visit()
    visit.expect("unusable", "Apparent diffusion coefficient map")
    visit.order("NW")
    visit.images([one for one in visit.instances if int(read(one).SeriesNumber) != ADC])


def _of_another_modality(day: Day, modality: str) -> None:
    visit = day.visit(Modality=modality)
    visit.expect("unmatched", f"no MR images ({modality})", runs=0, fetched=False)
    visit.order("NW")
    visit.images(visit.instances[:4])
    visit.until("unmatched")
    visit.order("SC", "CM")
    visit.order("SC", "CM")


def computed_tomography(day: Day) -> None:
    _of_another_modality(day, "CT")


def ultrasound(day: Day) -> None:
    _of_another_modality(day, "US")


def quality_phantom(day: Day) -> None:
    visit = day.visit(StudyDescription="QA PHANTOM weekly")
    visit.expect("unmatched", "set aside: a QA phantom", runs=0, fetched=False)
    visit.images()


def test_patient(day: Day) -> None:
    visit = day.visit(PatientName="ZZTEST^Prostate")
    visit.expect("unmatched", "set aside: a test patient", runs=0, fetched=False)
    _examine(visit)


STORIES: tuple[Story, ...] = (
    ordinary,
    same_number_at_two_sites,
    images_before_the_order,
    images_without_an_order,
    on_hold_and_resumed,
    merged_before_and_corrected,
    birth_date_corrected_in_time,
    late_series_that_matters,
    late_series_that_does_not_matter,
    everything_twice,
    cancelled_before_the_images,
    cancelled_while_on_hold,
    cancelled_during_the_reading,
    merged_before_the_images,
    merged_during_the_reading,
    birth_date_differs_in_the_ehr,
    sex_differs_in_a_message,
    same_accession_at_two_sites,
    same_accession_and_number_at_two_sites,
    order_without_images,
    stays_incomplete,
    computed_tomography,
    ultrasound,
    quality_phantom,
    test_patient,
)
