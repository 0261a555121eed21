"""The browser that other tests look at pages with."""


def test_a_page_is_drawn_and_its_problems_are_told(page, problems):
    page.set_content("<p id=here>drawn</p>")
    assert page.inner_text("#here") == "drawn"
    assert problems == []
    page.set_content(
        "<script>console.error('said')</script><img src='http://example.invalid/x.png'>"
        "<script>throw Error('x')</script>"
    )
    told = " ".join(problems)
    assert all(each in told for each in ("console: said", "exception: x", "request: http://example.invalid/x.png"))
