"use strict";
(() => {
  const byId = (id) => document.getElementById(id);

  // Tabs of the gallery. Without this script all panels stand one below the other.
  const tablist = byId("tablist");
  const tabs = tablist ? [...tablist.querySelectorAll("[role=tab]")] : [];
  const panelOf = (tab) => byId(tab.getAttribute("aria-controls"));
  const select = (chosen, focus) => {
    for (const tab of tabs) {
      const on = tab === chosen;
      tab.setAttribute("aria-selected", String(on));
      tab.tabIndex = on ? 0 : -1;
      panelOf(tab).hidden = !on;
    }
    if (focus) chosen.focus();
  };
  if (tablist) {
    tablist.hidden = false;
    for (const tab of tabs) {
      const panel = panelOf(tab);
      panel.setAttribute("role", "tabpanel");
      panel.setAttribute("aria-labelledby", tab.id);
      panel.tabIndex = 0;
      panel.classList.add("tabbed");
      tab.addEventListener("click", () => select(tab, false));
    }
    tablist.addEventListener("keydown", (event) => {
      const steps = { ArrowLeft: -1, ArrowRight: 1, Home: -tabs.length, End: tabs.length };
      if (!(event.key in steps)) return;
      event.preventDefault();
      const last = tabs.length - 1;
      const place = tabs.indexOf(document.activeElement) + steps[event.key];
      const turn = Math.abs(steps[event.key]) === 1;
      const next = place < 0 ? (turn ? last : 0) : place > last ? (turn ? 0 : last) : place;
      select(tabs[next], true);
    });
    select(tabs[0], false);
  }

  // A link opens the fold that it leads to.
  const open = () => {
    const fold = location.hash && byId(location.hash.slice(1))?.closest("details");
    if (fold) fold.open = true;
  };
  addEventListener("hashchange", open);
  open();

  // On a narrow screen the style sets a table's row as a block, where each cell says its column.
  for (const table of document.querySelectorAll(".scroll:not(.alarms) > table")) {
    const heads = [...table.tHead.rows[0].cells].map((cell) => cell.innerText.replaceAll("\n", " ").trim());
    for (const row of [...table.tBodies].flatMap((part) => [...part.rows])) {
      for (const cell of row.cells) {
        if (cell.tagName === "TD" && cell.colSpan === 1) cell.dataset.label = heads[cell.cellIndex];
      }
    }
    table.classList.add("stacked");
  }

  // The blind vote.
  const island = byId("votes-data");
  if (!island) return;
  const data = JSON.parse(island.textContent);
  const random = () => crypto.getRandomValues(new Uint32Array(1))[0] / 2 ** 32;
  const stage = byId("vote-stage");
  const end = byId("vote-end");
  let order = [];
  let votes = [];

  const shuffled = (items) => {
    const result = [...items];
    for (let i = result.length - 1; i > 0; i--) {
      const j = Math.floor(random() * (i + 1));
      [result[i], result[j]] = [result[j], result[i]];
    }
    return result;
  };

  const start = () => {
    order = shuffled(data.pairs).map((pair) => ({ pair, left: random() < 0.5 ? "baseline" : "candidate" }));
    votes = [];
    byId("vote-intro").hidden = true;
    show();
  };

  const show = () => {
    if (votes.length === order.length) return finish();
    const { pair, left } = order[votes.length];
    const right = left === "baseline" ? "candidate" : "baseline";
    for (const [side, role] of [["left", left], ["right", right]]) {
      const source = byId(pair[role]);
      const text = byId(`vote-text-${side}`);
      if (text) {
        // The whole of it, if the page has more than its beginning
        const parts = source.querySelectorAll("bdi");
        text.textContent = parts.length ? parts[parts.length - 1].textContent : source.textContent.trim();
        text.scrollTop = 0;
        continue;
      }
      const shown = byId(`vote-image-${side}`);
      shown.src = source.src;
      shown.width = source.width;
      shown.height = source.height;
      shown.className = source.className;
    }
    byId("vote-prompt").textContent = pair.prompt || "(empty prompt)";
    byId("vote-progress").textContent = `Pair ${votes.length + 1} of ${order.length}`;
    byId("vote-undo").disabled = votes.length === 0;
    end.hidden = true;
    stage.hidden = false;
    stage.focus({ preventScroll: true });
  };

  const vote = (choice) => {
    const { left } = order[votes.length];
    const right = left === "baseline" ? "candidate" : "baseline";
    votes.push({ choice, preferred: choice === "tie" ? null : choice === "left" ? left : right });
    show();
  };

  const undo = () => {
    if (votes.length === 0) return;
    votes.pop();
    show();
  };

  // Exact two-sided sign test; ties are left out.
  const signTest = (wins, losses) => {
    const n = wins + losses;
    let term = 0.5 ** n;
    let tail = 0;
    for (let k = 0; k <= Math.min(wins, losses); k++) {
      tail += term;
      term *= (n - k) / (k + 1);
    }
    return Math.min(1, 2 * tail);
  };

  const counts = () => {
    const count = (preferred) => votes.filter((vote) => vote.preferred === preferred).length;
    return { candidate: count("candidate"), tie: count(null), baseline: count("baseline") };
  };

  const exported = () => ({
    kind: "blind votes",
    schema_version: 1,
    title: data.title,
    protocol_id: data.protocol_id,
    guidance_scale: data.guidance_scale,
    baseline: data.baseline,
    candidate: data.candidate,
    num_pairs: order.length,
    tally: counts(),
    votes: votes.map(({ choice, preferred }, i) => {
      const { pair, left } = order[i];
      return { id: pair.id, k: pair.k, seed: pair.seed, left, choice, preferred };
    }),
  });

  const finish = () => {
    const { candidate, tie, baseline } = counts();
    const total = votes.length;
    const tally = byId("vote-tally");
    tally.replaceChildren();
    const name = (role) => {
      const element = document.createElement("bdi");
      element.textContent = data.labels[role];
      const strong = document.createElement("strong");
      strong.append(element);
      return strong;
    };
    if (total === 0) {
      tally.append("No votes yet.");
    } else {
      const p = signTest(candidate, baseline);
      const rate = (100 * (candidate + tie / 2)) / total;
      tally.append(
        name("candidate"), ` was better ${candidate} times, `, name("baseline"),
        ` ${baseline} times, ${tie} ties: a win rate of ${rate.toFixed(1)} %, sign test p `,
        p < 0.001 ? "< 0.001." : `= ${p.toFixed(3)}.`,
      );
    }
    for (const [role, number] of Object.entries({ candidate, tie, baseline })) {
      // Through the object model: the page's policy forbids style attributes only in markup
      byId(`vote-bar-${role}`).style.flexGrow = String(number);
    }
    byId("vote-json").value = JSON.stringify(exported(), null, 2) + "\n";
    byId("vote-back").disabled = total === 0;
    stage.hidden = true;
    end.hidden = false;
    end.focus({ preventScroll: true });
  };

  const save = () => {
    const address = URL.createObjectURL(new Blob([byId("vote-json").value], { type: "application/json" }));
    const link = document.createElement("a");
    link.href = address;
    link.download = `votes-${data.protocol_id.slice(0, 12)}.json`;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(address), 10000);
  };

  byId("vote-start").addEventListener("click", start);
  byId("vote-left").addEventListener("click", () => vote("left"));
  byId("vote-right").addEventListener("click", () => vote("right"));
  byId("vote-tie").addEventListener("click", () => vote("tie"));
  byId("vote-undo").addEventListener("click", undo);
  byId("vote-stop").addEventListener("click", finish);
  byId("vote-back").addEventListener("click", undo);
  byId("vote-again").addEventListener("click", start);
  byId("vote-save").addEventListener("click", save);
  stage.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
    const actions = {
      ArrowLeft: () => vote("left"), ArrowRight: () => vote("right"), ArrowDown: () => vote("tie"),
      u: undo, U: undo, Escape: finish,
    };
    if (!Object.hasOwn(actions, event.key)) return;
    // A long answer that has the focus is scrolled
    const inside = event.target.id.startsWith("vote-text") && event.target.scrollHeight > event.target.clientHeight;
    if (inside && event.key === "ArrowDown") return;
    event.preventDefault();
    actions[event.key]();
  });
  end.addEventListener("keydown", (event) => {
    if (event.key.toLowerCase() === "u" && event.target !== byId("vote-json")) undo();
  });
  byId("vote-needs").hidden = true;
  byId("ballot").hidden = false;
})();
