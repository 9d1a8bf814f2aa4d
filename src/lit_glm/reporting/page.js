document.querySelectorAll("table.rows").forEach(function (table) {
  table.querySelectorAll("th").forEach(function (head, column) {
    head.tabIndex = 0;
    function sort() {
      var body = table.tBodies[0], down = head.getAttribute("aria-sort") !== "descending";
      var text = function (row) { return row.cells[column].textContent.trim(); };
      var plain = /^([-+]?[0-9][0-9.,e+-]*)?(%|x)?(\/[0-9.]+)?( \[.*\])?$/;
      var numbers = Array.from(body.rows).every(function (row) { return plain.test(text(row)); });
      Array.from(body.rows).sort(function (a, b) {
        if (!text(a) || !text(b)) return (text(a) ? 0 : 1) - (text(b) ? 0 : 1);
        var order = text(a).localeCompare(text(b), undefined, {numeric: true});
        if (numbers) order = parseFloat(text(a)) - parseFloat(text(b));
        return down ? -order : order;
      }).forEach(function (row) { body.appendChild(row); });
      table.querySelectorAll("th").forEach(function (other) { other.removeAttribute("aria-sort"); });
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    }
    head.addEventListener("click", sort);
    head.addEventListener("keydown", function (event) { if (event.key === "Enter") sort(); });
  });
});
