"""Use the playground in Chromium as a person does: `playground.py SCENARIO JSON`.

It runs in the environment `playwright`. The last line of its output is JSON: what the scenario has
seen, and what every visit must be free of (see `Visit.report`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, Request, Route, expect, sync_playwright

# Longer than anything takes; it ends only a test that fails.
LIMIT_MILLISECONDS = 60_000
QUESTION = "What is the habitat of the otter?"
# Browsers log each answer with an error status; scenarios about errors expect these lines.
STATUS_LINE = "Failed to load resource"
WATCH_POLICY = """
window.policyViolations = [];
document.addEventListener("securitypolicyviolation", (event) => {
  window.policyViolations.push(`${event.violatedDirective} ${event.blockedURI}`);
});
"""


class Visit:
    """A page in the browser, and all that happens on it."""

    def __init__(self, page: Page, options: dict[str, Any]) -> None:
        self.page = page
        self.options = options
        self.url: str = options["url"]
        self.console: list[str] = []
        self.requests: list[Request] = []
        page.set_default_timeout(LIMIT_MILLISECONDS)
        page.add_init_script(WATCH_POLICY)
        page.on("console", self._log)
        page.on("pageerror", lambda error: self.console.append(f"uncaught: {error}"))
        page.on("request", self._remember)

    def _remember(self, request: Request) -> None:
        self.requests.append(request)

    def _log(self, message: Any) -> None:
        if message.type in {"error", "warning"}:
            self.console.append(message.text)

    def open(self, path: str = "") -> None:
        self.page.goto(self.url + path)

    def ready(self) -> None:
        self.open()
        self.status("Ready")

    def status(self, text: str) -> None:
        expect(self.page.locator("#status")).to_contain_text(text, timeout=LIMIT_MILLISECONDS)

    def ask(self, question: str = QUESTION) -> None:
        self.page.get_by_label("Your message").fill(question)
        self.page.keyboard.press("Enter")

    def answered(self) -> None:
        self.status("All answers are there")

    def text(self, kind: str) -> str:
        return self.page.locator(f'[data-kind="{kind}"] .text').inner_text()

    def bodies(self) -> list[Any]:
        """Return the bodies of the completions that the page asked for."""
        completions = [r for r in self.requests if r.url.endswith("/v1/chat/completions")]
        return [json.loads(request.post_data or "null") for request in completions]

    def slide(self, method: str, label: str, key: str) -> None:
        """Move a slider of a method by the keyboard."""
        panel = self.page.locator(f'[data-method="{method}"]')
        slider = panel.get_by_label(f"{label}, slider", exact=True)
        slider.focus()
        self.page.keyboard.press(key)

    def method(self, name: str) -> Any:
        return self.page.locator(f'[data-param="align.{name}"]').first

    def faults(self) -> list[str]:
        """Return what axe calls serious or critical."""
        found = Axe().run(self.page).response["violations"]
        return [
            f"{each['id']}: {node['html']}"
            for each in found
            if each["impact"] in {"serious", "critical"}
            for node in each["nodes"]
        ]

    def report(self) -> dict[str, Any]:
        host = urlsplit(self.url).netloc
        hosts = {urlsplit(request.url).netloc for request in self.requests}
        return {
            "console": [line for line in self.console if not line.startswith(STATUS_LINE)],
            "violations": self.page.evaluate("window.policyViolations"),
            "other_hosts": sorted(hosts - {host}),
        }


def first_answer(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.page.evaluate(
        """() => {
          window.texts = [];
          new MutationObserver(() => {
            const text = document.querySelector('[data-kind="plain"] .text')?.textContent ?? "";
            if (window.texts.at(-1) !== text) window.texts.push(text);
          }).observe(document.getElementById("answers"), {subtree: true, childList: true});
        }"""
    )
    visit.ask()
    visit.answered()
    return {
        "cards": visit.page.locator(".answer h3").all_inner_texts(),
        "texts": {kind: visit.text(kind) for kind in ("plain", "greedy", "aligned")},
        "pieces": visit.page.evaluate("window.texts"),
        "bodies": visit.bodies(),
        "turns": visit.page.locator(".turn p").all_inner_texts(),
        "cost": visit.page.locator("#cost").inner_text(),
        "faults": visit.faults(),
    }


def second_question(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.ask()
    visit.answered()
    first = visit.text("aligned")
    visit.ask("And the owl?")
    visit.answered()
    body = visit.bodies()[-1]
    visit.page.get_by_role("button", name="New chat").click()
    return {
        "first": first,
        "messages": body["messages"],
        "turns_after": visit.page.locator(".turn").count(),
        "cards_after": visit.page.locator(".answer").count(),
    }


def slider(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.method("best_of_n").uncheck()
    visit.ask()
    visit.answered()
    before = {kind: visit.text(kind) for kind in ("plain", "aligned")}
    count = len(visit.bodies())
    with visit.page.expect_response("**/v1/chat/completions"):
        visit.slide(*visit.options["slide"])
    expect(visit.page.locator('[data-kind="aligned"]')).to_have_attribute("data-state", "done")
    visit.answered()
    return {
        "before": before,
        "after": {kind: visit.text(kind) for kind in ("plain", "aligned")},
        "bodies": visit.bodies()[count:],
        "coloured": visit.page.locator('[data-kind="aligned"] .text [class*="level-"]').count(),
        "direction": visit.page.locator(".direction").all_inner_texts(),
        "cost": visit.page.locator("#cost").inner_text(),
        "faults": visit.faults(),
    }


def rewards(visit: Visit) -> dict[str, Any]:
    visit.ready()
    names = visit.page.locator(".rewards .reward > label:first-child")
    return {"names": [text.strip() for text in names.all_inner_texts()]}


def own_trait(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.method("best_of_n").uncheck()
    visit.page.get_by_role("button", name="Type a trait of your own").click()
    trait = visit.page.get_by_role("group", name="Your trait 1")
    trait.get_by_label("Name").fill(visit.options["trait"])
    trait.get_by_label("What to ask for").fill("Answer politely.")
    trait.get_by_label("Scale", exact=True).fill("2")
    visit.ask()
    visit.answered()
    body = visit.bodies()[-1]
    trait.get_by_role("button", name="Remove trait 1").click()
    visit.answered()
    return {
        "align": body["align"],
        "error": visit.page.locator(".error:visible").all_inner_texts(),
        "cost": visit.page.locator("#cost").inner_text(),
    }


def candidates(visit: Visit) -> dict[str, Any]:
    visit.ready()
    for name in visit.options.get("methods", []):
        visit.method(name).check()
    for slide in visit.options.get("slides", []):
        visit.slide(*slide)
    visit.ask()
    visit.answered()
    items = []
    for item in visit.page.locator(".candidate").all():
        dots = item.locator(".member")
        items.append(
            {
                "index": int(item.get_attribute("data-index") or -1),
                "title": item.locator("h3").inner_text(),
                "text": item.inner_text(),
                "dots": [float((dot.get_attribute("cx") or "0").rstrip("%")) for dot in dots.all()],
                "labels": [each.get_attribute("aria-label") for each in item.locator("svg").all()],
            }
        )
    return {
        "items": items,
        "reason": visit.page.locator(".reason").inner_text(),
        "body": visit.bodies()[-1],
        "curl": visit.page.locator("#curl").text_content(),
        "python": visit.page.locator("#python").text_content(),
        "preset": visit.page.locator("#preset-toml").text_content(),
        "faults": visit.faults(),
    }


PROFILE = "section:has(> #profile)"


class ProfileSection:
    """The part of the page that shows the person's profile."""

    def __init__(self, visit: Visit) -> None:
        self.visit = visit
        self.page = visit.page
        self.node = visit.page.locator(PROFILE)

    def status(self, text: str) -> None:
        status = self.node.get_by_role("status")
        expect(status).to_contain_text(text, timeout=LIMIT_MILLISECONDS)

    def weights(self) -> dict[str, float]:
        """Return {name: place of its point on the axis}."""
        points = {}
        for row in self.node.locator(".weights .score").all():
            name = row.locator(".reward").inner_text()
            place = row.locator(".weight").get_attribute("cx") or ""
            points[name] = float(place.rstrip("%"))
        return points

    def labels(self) -> list[str | None]:
        pictures = self.node.locator(".weights svg").all()
        return [picture.get_attribute("aria-label") for picture in pictures]

    def words(self) -> list[str]:
        return self.node.locator(".words li").all_inner_texts()

    def prefer(self, text: str) -> None:
        candidate = self.page.locator(".candidate", has_text=text).first
        candidate.get_by_role("button", name="Prefer this one").click()

    def use(self) -> None:
        self.node.get_by_label("Use my profile in the aligned answer").check()

    def download(self) -> Any:
        with self.page.expect_download() as download:
            self.node.get_by_role("button", name="Download everything").click()
        return json.loads(Path(download.value.path()).read_text(encoding="utf-8"))

    def delete(self) -> None:
        self.page.once("dialog", lambda dialog: dialog.accept())
        self.node.get_by_role("button", name="Delete the profile").click()
        self.status("The profile is deleted")


def profile(visit: Visit) -> dict[str, Any]:
    """Prefer a candidate twice, use the profile, see all of it, and delete it."""
    visit.ready()
    section = ProfileSection(visit)
    section.status("No choices yet")
    visit.ask()
    visit.answered()
    section.prefer(visit.options["prefer"])
    section.status(visit.options["choices"][0])
    first = section.weights()
    section.prefer(visit.options["prefer"])
    section.status(visit.options["choices"][1])
    count = len(visit.bodies())
    with visit.page.expect_response("**/v1/chat/completions"):
        section.use()
    visit.answered()
    seen = {
        "weights": [first, section.weights()],
        "labels": section.labels(),
        "words": section.words(),
        "bodies": visit.bodies()[count:],
        "aligned": visit.text("aligned"),
        "ask": section.node.get_by_role("button", name="Ask me").is_enabled(),
        "curl": visit.page.locator("#curl").text_content(),
        "faults": visit.faults(),
    }
    visit.page.reload()
    visit.status("Ready")
    section.status(visit.options["choices"][1])
    seen["download"] = section.download()
    section.delete()
    seen["left"] = section.weights()
    seen["storage"] = visit.page.evaluate("JSON.stringify({...localStorage})")
    return seen


def question(visit: Visit) -> dict[str, Any]:
    """Let the server ask, and answer by the keyboard."""
    visit.ready()
    section = ProfileSection(visit)
    section.status("No choices yet")
    button = section.node.get_by_role("button", name="Ask me")
    button.click()
    section.status("Type a message first")
    visit.page.get_by_label("Your message").fill(QUESTION)
    button.click()
    section.status("Which answer do you prefer?")
    answers = section.node.locator(".question .text").all_inner_texts()
    focused = visit.page.evaluate("document.activeElement.textContent")
    width = visit.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    faults = visit.faults()
    visit.page.keyboard.press("Enter")
    section.status("1 choices")
    return {
        "answers": answers,
        "focused": focused,
        "focused_after": visit.page.evaluate("document.activeElement.textContent"),
        "open": section.node.locator(".question .answer").count(),
        "weights": section.weights(),
        "width": width,
        "faults": faults,
    }


def profile_problem(visit: Visit) -> dict[str, Any]:
    """Prefer a candidate while the store is down."""
    visit.ready()
    section = ProfileSection(visit)
    visit.ask()
    visit.answered()
    section.prefer(visit.options["prefer"])
    alert = section.node.get_by_role("alert")
    expect(alert).to_be_visible()
    return {"alert": alert.inner_text(), "faults": visit.faults()}


def cancel(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.ask()
    visit.status("Answering")
    running = visit.page.locator('[data-state="drawing"], [data-state="writing"]')
    expect(running).to_have_count(3)
    progress = visit.page.locator("progress").count()
    if visit.options["by"] == "key":
        visit.page.keyboard.press("Escape")
    else:
        visit.page.get_by_role("button", name="Cancel").click()
    visit.status("Cancelled")
    return {
        "states": visit.page.locator(".state").all_inner_texts(),
        "progress": progress,
        "still_running": running.count(),
    }


def progress(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.ask()
    aligned = visit.page.locator('[data-kind="aligned"]')
    expect(aligned.locator(".state")).to_contain_text("are finished")
    bar = aligned.locator("progress")
    seen = {
        "state": aligned.locator(".state").inner_text(),
        "bar": [bar.get_attribute("value"), bar.get_attribute("max")],
        "faults": visit.faults(),
    }
    visit.page.keyboard.press("Escape")
    visit.status("Cancelled")
    return seen


def errors(visit: Visit) -> dict[str, Any]:
    visit.ready()
    for label, value in visit.options["fill"].items():
        field = visit.page.get_by_label(label, exact=True).first
        field.evaluate("(each) => { each.closest('details').open = true; }")
        field.fill(value)
        field.press("Tab")
    visit.ask()
    visit.status("An answer failed")
    return {
        "errors": visit.page.locator(".answer .error").all_inner_texts(),
        "marked": visit.page.locator("[aria-invalid=true]").evaluate_all(
            "(all) => all.map((each) => each.dataset.param)"
        ),
        "faults": visit.faults(),
    }


def unreachable(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    visit.ask()
    visit.status("An answer failed")
    return {"errors": visit.page.locator(".answer .error").all_inner_texts()}


def key(visit: Visit) -> dict[str, Any]:
    visit.open()
    problem = visit.page.locator("#problem")
    expect(problem).to_be_visible()
    refused = problem.inner_text()
    expect(visit.page.get_by_label("Key of this server")).to_be_focused()
    visit.page.keyboard.type("wrong")
    visit.page.keyboard.press("Enter")
    expect(problem).to_be_visible()
    visit.page.get_by_label("Key of this server").fill(visit.options["key"])
    visit.page.keyboard.press("Enter")
    visit.status("Ready")
    visit.page.reload()
    visit.status("Ready")
    visit.ask()
    visit.answered()
    visible = visit.page.content()
    visit.page.goto(visit.url + "docs")
    visit.status("routes")
    visit.page.goto(visit.url)
    visit.status("Ready")
    visit.page.locator("#key summary").click()
    visit.page.get_by_role("button", name="Forget the key").click()
    expect(problem).to_be_visible()
    return {
        "refused": refused,
        "visible": visit.options["key"] in visible,
        "stored_after": visit.page.evaluate("JSON.stringify({...localStorage, ...sessionStorage})"),
        "cookies": len(visit.page.context.cookies()),
    }


def phone(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.ask()
    visit.answered()
    width = visit.page.evaluate(
        "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
    )
    buttons = visit.page.locator("button:visible, summary:visible")
    heights = buttons.evaluate_all("(all) => all.map((each) => each.offsetHeight)")
    return {"width": width, "lowest": min(heights), "faults": visit.faults()}


def keyboard(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.page.keyboard.press("Tab")
    first = visit.page.evaluate("document.activeElement.textContent")
    visit.page.keyboard.press("Enter")
    visit.page.keyboard.type("one")
    visit.page.keyboard.press("Shift+Enter")
    visit.page.keyboard.type("two")
    visit.page.keyboard.press("Enter")
    visit.answered()
    return {"first": first, "question": visit.bodies()[0]["messages"][-1]["content"]}


def reference(visit: Visit) -> dict[str, Any]:
    visit.open("docs")
    visit.status("routes")
    route = visit.page.locator("#chat_completions")
    route.get_by_text("Request", exact=True).click()
    route.locator("summary", has_text="align").first.click()
    method = route.locator("summary", has_text="best_of_n").first
    method.click()
    visit.page.wait_for_selector("#chat_completions code:text-is('n')")
    return {
        "routes": visit.page.locator("#contents a").all_inner_texts(),
        "text": route.inner_text(),
        "faults": visit.faults(),
    }


def new_method(visit: Visit) -> dict[str, Any]:
    """Serve a list with a method that no page has ever seen."""

    def extend(route: Route) -> None:
        answer = route.fetch()
        catalog = answer.json()
        catalog["methods"]["zeal"] = visit.options["method"]
        route.fulfill(response=answer, json=catalog)

    visit.page.route("**/v1/align/methods", extend)
    visit.ready()
    visit.method("best_of_n").uncheck()
    visit.method("zeal").check()
    panel = visit.page.locator('[data-method="zeal"]')
    panel.evaluate("(each) => each.querySelectorAll('details').forEach((d) => { d.open = true; })")
    panel.get_by_label("Strength", exact=True).fill("0.75")
    panel.get_by_label("Mode", exact=True).select_option("hard")
    panel.get_by_label("Silent", exact=True).check()
    panel.get_by_label("Motto", exact=True).fill("go")
    panel.get_by_label("Free", exact=True).fill('"all"')
    panel.get_by_role("button", name="Add to Steps").click()
    panel.get_by_label("Text", exact=True).fill("first")
    panel.get_by_label("Name to add to Gates").fill("quality")
    panel.get_by_role("button", name="Add", exact=True).click()
    panel.get_by_label("At least", exact=True).fill("0")
    panel.get_by_label("a", exact=True).fill("2")
    panel.get_by_label("a", exact=True).press("Tab")
    visit.page.route("**/v1/chat/completions", lambda route: route.abort())
    visit.ask()
    visit.status("An answer failed")
    return {"align": visit.bodies()[-1]["align"], "panel": panel.inner_text()}


def preset(visit: Visit) -> dict[str, Any]:
    visit.ready()
    visit.ask()
    visit.answered()
    count = len(visit.bodies())
    visit.page.get_by_label("Preset", exact=True).select_option(visit.options["preset"])
    visit.status("Answering")
    visit.answered()
    return {
        "bodies": visit.bodies()[count:],
        "content": visit.page.locator("#preset-content").text_content(),
        "reason": visit.page.locator(".reason").inner_text(),
    }


def pictures(visit: Visit) -> dict[str, Any]:
    """Take the pictures of docs/playground.md."""
    folder = visit.options["folder"]
    page = visit.page

    def take(name: str, place: str, *, rows: int) -> None:
        page.evaluate("window.scrollTo(0, 0)")
        box = page.locator(place).bounding_box() or {}
        clip = {"x": box["x"], "y": box["y"], "width": box["width"], "height": rows}
        page.screenshot(path=f"{folder}/{name}.png", clip=clip, full_page=True)  # type: ignore[arg-type]

    visit.ready()
    visit.ask()
    visit.answered()
    visit.slide("vas", "helpful", "ArrowRight")
    visit.slide("vas", "helpful", "ArrowRight")
    visit.answered()
    take("playground", "body", rows=620)
    take("playground-candidates", "#results section:first-child", rows=330)
    section = ProfileSection(visit)
    section.prefer("3. ")
    section.status("choices.")
    section.node.get_by_role("button", name="Ask me").click()
    section.status("Which answer do you prefer?")
    height = page.locator(PROFILE).bounding_box() or {}
    take("playground-profile", PROFILE, rows=round(height["height"]))
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 780})
    page.evaluate("window.scrollTo(0, 0)")
    page.screenshot(path=f"{folder}/playground-phone.png")
    return {}


SCENARIOS: dict[str, Callable[[Visit], dict[str, Any]]] = {
    each.__name__: each
    for each in (
        first_answer,
        second_question,
        slider,
        own_trait,
        rewards,
        candidates,
        cancel,
        progress,
        errors,
        unreachable,
        key,
        phone,
        keyboard,
        reference,
        new_method,
        preset,
        profile,
        question,
        profile_problem,
        pictures,
    )
}


def main() -> None:
    options = json.loads(sys.argv[2])
    with sync_playwright() as playwright:
        path = options["browser"] or playwright.chromium.executable_path
        if not Path(path).exists():
            print(json.dumps({"missing": path}))
            return
        browser = playwright.chromium.launch(
            executable_path=path,
            args=["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"],
        )
        context = browser.new_context(
            viewport={"width": options.get("width", 1280), "height": 900},
            color_scheme=options.get("colours", "light"),
        )
        visit = Visit(context.new_page(), options)
        seen = SCENARIOS[sys.argv[1]](visit)
        report = visit.report()
        browser.close()
    print(json.dumps({**seen, **report}))


main()
