// Before the first paint: the theme that was chosen here before. Without a choice the system's holds.
try {
  const chosen = localStorage.getItem("raypg-theme");
  if (chosen === "light" || chosen === "dark") document.documentElement.dataset.theme = chosen;
} catch {
  // No storage: the system's.
}
